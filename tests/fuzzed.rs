//! The fuzz entries over their corpus: real images, and all that fuzzing ever found.

// A library to the fuzz targets.
#[allow(unreachable_pub)]
#[path = "../fuzz/entries/mod.rs"]
mod entries;

use std::fs;
use std::path::Path;

/// Inputs that there are of each kind at least; fewer are lost ones.
const LEAST_INPUTS: usize = 3;

/// What takes Miri longer than all the rest: it hashes key material.
const TOO_MUCH_FOR_MIRI: &str = "luks/seed-key-material";

#[test]
fn every_fuzz_entry_takes_its_whole_corpus() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for entries::Entry { name, function, corpora } in entries::ENTRIES {
        let mut count = 0;
        for folder in corpora.iter().map(|folder| corpus.join(folder)) {
            // Those that have none of their own but what was found.
            let Ok(inputs) = fs::read_dir(&folder) else { continue };
            for input in inputs {
                let path = input.unwrap().path();
                if cfg!(miri) && path.ends_with(TOO_MUCH_FOR_MIRI) {
                    continue;
                }
                // Seen when it panics.
                println!("{name} {}", path.display());
                function(&fs::read(&path).unwrap());
                count += 1;
            }
        }
        assert!(count >= LEAST_INPUTS, "{name}: {count} inputs");
    }
}
