use std::fs;
use std::os::unix::fs::symlink;

use super::*;
use crate::format::Format;
use crate::format::qcow2::tests::Builder;
use crate::open::{NamedIn, OpenPolicy, open_chain};

/// `images/` with an image, `golden/` beside it, and a secret above both.
struct World(tempfile::TempDir);

impl World {
    fn new() -> Self {
        let world = Self(tempfile::tempdir().unwrap());
        for directory in ["images/below", "golden"] {
            fs::create_dir_all(world.path(directory)).unwrap();
        }
        for file in ["images/disk", "images/base", "images/below/base", "golden/base", "secret"] {
            fs::write(world.path(file), file).unwrap();
        }
        world
    }

    /// Links to directories of the machine's own do not matter here.
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().canonicalize().unwrap().join(name)
    }

    /// What is read where `images/disk` names that.
    fn open(&self, name: &str, allowed: &[&str]) -> Result<String> {
        let allowed = allowed.iter().map(|path| self.path(path)).collect();
        self.open_within(name, &Reach { allowed, policy_file: None })
    }

    fn open_within(&self, name: &str, reach: &Reach) -> Result<String> {
        let mut confinement = Confinement::new(reach);
        let disk = self.path("images/disk");
        confinement.add_image(&disk, &Source::open(&disk)?);
        let source = confinement.open(&self.path("images").join(name))?;
        let mut text = vec![0; usize::try_from(source.length().get()).unwrap()];
        source.read_exact(crate::units::HostOffset::ZERO, &mut text, "it").unwrap();
        Ok(String::from_utf8(text).unwrap())
    }

    #[track_caller]
    fn refused(&self, name: &str, allowed: &[&str]) -> String {
        let error = self.open(name, allowed).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::PermissionDenied(_)), "{name}: {error}");
        error.to_string()
    }
}

#[test]
fn an_image_reaches_what_lies_beside_and_below_it() {
    let world = World::new();
    let absolute = world.path("images/base").into_os_string().into_string().unwrap();
    for name in ["base", "./base", "below/../base", "../images/base", &absolute] {
        assert_eq!(world.open(name, &[]).unwrap(), "images/base", "{name}");
    }
    assert_eq!(world.open("below/base", &[]).unwrap(), "images/below/base");
}

#[test]
fn an_image_reaches_nothing_else_unless_somebody_says_so() {
    let world = World::new();
    let said = world.refused("../golden/base", &[]);
    let golden = world.path("golden");
    assert!(said.contains(&format!("--allow-path={} allows it", golden.display())), "{said}");
    assert!(said.contains("outside the directory of the image"), "{said}");
    world.refused("/etc/passwd", &["golden"]);
    world.refused("../secret", &["golden"]);
    world.refused("..", &[]);
    assert_eq!(world.open("../golden/base", &["golden"]).unwrap(), "golden/base");
    assert_eq!(world.open("../golden/base", &["."]).unwrap(), "golden/base");
    // A file is one file and no more.
    assert_eq!(world.open("../secret", &["secret"]).unwrap(), "secret");
    world.refused("../golden/base", &["secret", "not-there"]);
}

#[test]
fn a_link_reaches_no_further_than_the_file_it_leads_to() {
    let world = World::new();
    symlink("../secret", world.path("images/link")).unwrap();
    symlink(world.path("golden"), world.path("images/golden")).unwrap();
    symlink(world.path("images/base"), world.path("images/inside")).unwrap();
    let said = world.refused("link", &["golden"]);
    assert!(said.contains(&world.path("secret").display().to_string()), "{said}");
    world.refused("golden/base", &[]);
    assert_eq!(world.open("golden/base", &["golden"]).unwrap(), "golden/base");
    assert_eq!(world.open("inside", &[]).unwrap(), "images/base");
    // What is allowed may be named through a link, too.
    symlink(world.path("golden"), world.path("gold")).unwrap();
    assert_eq!(world.open("../golden/base", &["gold"]).unwrap(), "golden/base");
}

#[test]
fn a_link_that_comes_after_the_look_is_not_followed() {
    let world = World::new();
    let tree = Tree::open(&world.path("images")).unwrap();
    symlink("../secret", world.path("images/late")).unwrap();
    symlink("../golden", world.path("images/later")).unwrap();
    for path in ["late", "later/base", "../secret", "below/../../secret"] {
        let opened = open_beneath(&tree.directory, Path::new(path));
        assert!(matches!(opened, Err(Errno::ELOOP | Errno::EXDEV)), "{path}: {opened:?}");
        let walked = walk_beneath(&tree.directory, Path::new(path));
        let refused = matches!(walked, Err(Errno::ELOOP | Errno::ENOTDIR | Errno::EXDEV));
        assert!(refused, "{path}: {walked:?}");
    }
    for path in ["base", "below/base", "."] {
        let id = |fd: OwnedFd| FileId::of(&File::from(fd).metadata().unwrap());
        let opened = id(open_beneath(&tree.directory, Path::new(path)).unwrap());
        let walked = id(walk_beneath(&tree.directory, Path::new(path)).unwrap());
        let there = FileId::of_path(&world.path("images").join(path)).unwrap();
        assert_eq!((opened, walked), (there, there), "{path}");
    }
}

#[test]
fn the_image_has_the_directory_it_is_named_in_and_the_one_it_lies_in() {
    let world = World::new();
    fs::create_dir(world.path("links")).unwrap();
    symlink(world.path("images/disk"), world.path("links/disk")).unwrap();
    fs::write(world.path("links/near"), "").unwrap();
    let reach = Reach::default();
    let mut confinement = Confinement::new(&reach);
    let disk = world.path("links/disk");
    confinement.add_image(&disk, &Source::open(&disk).unwrap());
    assert!(confinement.open(&world.path("links/near")).is_ok());
    assert!(confinement.open(&world.path("images/base")).is_ok());
    assert!(confinement.open(&world.path("golden/base")).is_err());
}

#[test]
fn the_policy_file_is_asked_where_nothing_else_allows() {
    let world = World::new();
    let reach = |text: &str| {
        fs::write(world.path("conf"), text).unwrap();
        Reach { allowed: Vec::new(), policy_file: Some(world.path("conf")) }
    };
    let golden = reach(&format!("allow-path {}\n", world.path("golden").display()));
    assert_eq!(world.open_within("../golden/base", &golden).unwrap(), "golden/base");
    assert!(world.open_within("../secret", &golden).is_err());
    let wrong = reach("allow golden\n");
    assert_eq!(world.open_within("base", &wrong).unwrap(), "images/base");
    let error = world.open_within("../golden/base", &wrong).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::InvalidTab(_)), "{error}");
    assert_eq!(error.path(), Some(&*world.path("conf")));
}

#[test]
fn a_file_that_is_not_there_is_said_to_be_missing_and_not_to_be_forbidden() {
    let world = World::new();
    for name in ["nothing", "../golden/nothing"] {
        let error = world.open(name, &[]).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::NotFound(_)), "{error}");
    }
}

#[test]
fn a_chain_is_confined_to_the_directory_of_its_active_layer() {
    let world = World::new();
    let backed = |path: &str, backing: &str| {
        let mut image = Builder::new(4);
        let length = u32::try_from(backing.len()).unwrap();
        image.u64(8, 512).u32(16, length).put(512, backing.as_bytes());
        fs::write(world.path(path), &image.bytes).unwrap();
    };
    backed("images/overlay", "below/middle");
    backed("images/below/middle", "../base");
    let open = |image: &str, policy: OpenPolicy| {
        let policy = OpenPolicy { probe_backing: true, ..policy };
        open_chain(&world.path(image), &policy)
    };
    assert_eq!(open("images/overlay", OpenPolicy::default()).unwrap().chain.layers().len(), 3);
    // The same layer is not in the directory of the one below.
    let error = open("images/below/middle", OpenPolicy::default()).unwrap_err();
    assert!(error.to_string().contains("(the backing file of "), "{error}");
    assert_eq!(error.path(), Some(&*world.path("images/below/../base")));
    // A name that the user gives is the user's word, and so are those beside it.
    backed("golden/overlay", "base");
    let backing = Some((world.path("golden/overlay"), Format::Qcow2));
    let policy = OpenPolicy { backing, ..OpenPolicy::default() };
    assert_eq!(open("images/overlay", policy).unwrap().chain.layers().len(), 3);
    // One that a file gives is not.
    for (only_data_file, is_open) in [(true, true), (false, false)] {
        let named_in = Some(NamedIn { file: world.path("images/store"), only_data_file });
        let policy = OpenPolicy { named_in, ..OpenPolicy::default() };
        assert_eq!(open("golden/overlay", policy).is_ok(), is_open, "{only_data_file}");
    }
}

#[test]
fn a_link_put_in_an_images_place_once_it_is_open_widens_nothing() {
    let world = World::new();
    let reach = Reach::default();
    for (name, target) in [("images/disk", "golden/base"), ("images/below", "golden")] {
        let path = world.path("images/below/base");
        let path = if name == "images/disk" { world.path(name) } else { path };
        let image = Source::open(&path).unwrap();
        fs::rename(world.path(name), world.path("moved")).unwrap();
        symlink(world.path(target), world.path(name)).unwrap();
        let mut confinement = Confinement::new(&reach);
        confinement.add_image(&path, &image);
        let error = confinement.open(&world.path("golden/base")).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::PermissionDenied(_)), "{name}: {error}");
        fs::remove_file(world.path(name)).unwrap();
        fs::rename(world.path("moved"), world.path(name)).unwrap();
    }
}

#[test]
fn what_lies_beside_device_nodes_is_no_images_own() {
    let directory = Tree::open(Path::new("/dev")).unwrap();
    assert!(directory.is_the_systems());
    let world = World::new();
    assert!(!Tree::open(&world.path("images")).unwrap().is_the_systems());
}
