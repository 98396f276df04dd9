use super::*;

/// A cow image of User-Mode Linux version 3 over `backing`, which it remembers to be
/// `size` bytes long and changed at `modified`.
fn cow_over(directory: &Path, backing: &str, size: u64, modified: u32) -> PathBuf {
    let mut bytes = vec![0; 64 << 10];
    bytes[..8].copy_from_slice(b"OOOM\0\0\0\x03");
    bytes[8..12].copy_from_slice(&modified.to_be_bytes());
    bytes[12..20].copy_from_slice(&size.to_be_bytes());
    bytes[20..24].copy_from_slice(&512u32.to_be_bytes());
    bytes[24..28].copy_from_slice(&4096u32.to_be_bytes());
    bytes[32..32 + backing.len()].copy_from_slice(backing.as_bytes());
    let path = directory.join("x.cow");
    std::fs::write(&path, bytes).unwrap();
    path
}

fn kinds(info: &ImageInfo) -> Vec<&'static str> {
    info.notices.iter().map(InfoNotice::name).collect()
}

#[test]
fn a_cow_image_says_what_it_remembers_of_its_backing_file() {
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path().join("base");
    std::fs::write(&base, vec![0; 1 << 20]).unwrap();
    let modified = Source::open(&base).unwrap().modified().unwrap();
    let modified = u32::try_from(modified & 0xffff_ffff).unwrap();
    let cow = cow_over(directory.path(), "base", 1 << 20, modified);
    let chain = chain_info(&cow, &InfoOptions::default()).unwrap();
    let [top, bottom] = chain.as_slice() else { panic!("{chain:?}") };
    assert_eq!((top.format, bottom.format), (Format::Cow, Format::Raw));
    assert_eq!(top.virtual_size.get(), 1 << 20);
    assert_eq!(top.cow_layout, Some(CowLayout::UmlV3));
    let backing = top.backing.as_ref().unwrap();
    assert_eq!(backing.full_name, base.into_os_string().into_encoded_bytes());
    assert_eq!(backing.recorded.unwrap().modified, modified);
    assert_eq!(kinds(bottom), [""; 0]);

    let cow = cow_over(directory.path(), "base", 1 << 20, modified ^ 1);
    let chain = chain_info(&cow, &InfoOptions::default()).unwrap();
    assert_eq!(kinds(&chain[1]), ["changed-backing-file"]);
}

#[test]
fn the_backing_file_is_opened_for_the_chain_only() {
    let directory = tempfile::tempdir().unwrap();
    let cow = cow_over(directory.path(), "gone", 1 << 20, 0);
    let info = image_info(&cow, &InfoOptions::default()).unwrap();
    assert_eq!(info.backing.unwrap().name, b"gone");
    drop(info.file);
    let error = chain_info(&cow, &InfoOptions::default()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::NotFound(_)), "{error}");
    assert!(error.to_string().contains("the backing file of"), "{error}");
}

#[test]
fn locks_of_others_are_told_and_our_own_are_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.raw");
    std::fs::write(&path, [0; 512]).unwrap();
    let first = image_info(&path, &InfoOptions::default()).unwrap();
    assert_eq!(first.file.locks, []);
    let second = image_info(&path, &InfoOptions::default()).unwrap();
    let bytes: Vec<_> = second.file.locks.iter().map(|lock| lock.byte()).collect();
    assert_eq!(bytes, [100, 201, 202, 203]);
}
