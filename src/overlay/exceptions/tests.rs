use proptest::prelude::*;

use super::check::Limits;
use super::*;
use crate::ErrorKind;

/// What lies before the store in the file.
pub(crate) const START: u64 = 4096;

/// A store of chunks of so many sectors, as the kernel writes it: each pair is a chunk of the
/// disk and the byte that the whole of it is full of.
pub(crate) fn store(sectors: u32, changed: &[(u64, u8)]) -> Vec<u8> {
    let chunk = usize::try_from(sectors).unwrap() * 512;
    let per_area = chunk / 16;
    let mut bytes = vec![0; usize::try_from(START).unwrap() + 2 * chunk];
    let base = usize::try_from(START).unwrap();
    let header = PersistentHeader { chunk: Sectors::new(sectors.into()), valid: true };
    bytes[base..base + HEADER_LENGTH].copy_from_slice(&header.to_bytes().unwrap());
    for (index, &(old, fill)) in changed.iter().enumerate() {
        let (area, slot) = (1 + index / per_area * (per_area + 1), index % per_area);
        let new = area + 1 + slot;
        bytes.resize(base + (new + 1) * chunk, fill);
        let pair = base + area * chunk + slot * 16;
        bytes[pair..pair + 8].copy_from_slice(&old.to_le_bytes());
        bytes[pair + 8..pair + 16].copy_from_slice(&u64::try_from(new).unwrap().to_le_bytes());
        // A full area is followed by an empty one.
        if slot + 1 == per_area {
            bytes.resize(base + (new + 2) * chunk, 0);
        }
    }
    bytes
}

fn source(bytes: Vec<u8>) -> Source {
    Source::from_bytes("x.store", bytes)
}

fn open(source: &Source, disk: u64) -> Result<ExceptionStore<'_>> {
    ExceptionStore::open(source, HostOffset::new(START), ByteLen::new(disk))
}

/// Start, end and place of each run.
fn runs(changes: &Changes<'_>) -> Vec<(u64, u64, Option<u64>)> {
    let run = |run: Result<Run>| {
        let Run { range, place } = run.unwrap();
        (range.start.get(), range.end.get(), place.map(HostOffset::get))
    };
    changes.runs().map(run).collect()
}

fn failure(bytes: Vec<u8>, disk: u64) -> Error {
    let source = source(bytes);
    open(&source, disk).and_then(ExceptionStore::changes).expect_err("a store that is wrong")
}

/// The second half of the pair of this number in the first area.
fn put_new(bytes: &mut [u8], sectors: usize, slot: usize, new: u64) {
    let at = usize::try_from(START).unwrap() + sectors * 512 + slot * 16 + 8;
    bytes[at..at + 8].copy_from_slice(&new.to_le_bytes());
}

#[test]
fn changed_chunks_come_in_the_order_of_the_disk_and_joined_where_the_store_goes_on() {
    let source = source(store(8, &[(7, 1), (2, 2), (3, 3), (9, 4)]));
    // The disk ends inside of its chunk 9.
    let changes = open(&source, 9 * 4096 + 512).unwrap().changes().unwrap();
    let place = |new: u64| Some(START + new * 4096);
    let wanted = [
        (0, 2 * 4096, None),
        (2 * 4096, 4 * 4096, place(3)),
        (4 * 4096, 7 * 4096, None),
        (7 * 4096, 8 * 4096, place(2)),
        (8 * 4096, 9 * 4096, None),
        (9 * 4096, 9 * 4096 + 512, place(5)),
    ];
    assert_eq!(runs(&changes), wanted);
    assert_eq!(changes.count(), 4);
    let inside = changes.at(GuestOffset::new(2 * 4096 + 700)).unwrap();
    assert_eq!(inside.place, Some(HostOffset::new(START + 3 * 4096 + 700)));
    assert_eq!(inside.range.end, GuestOffset::new(4 * 4096));
    assert!(changes.at(GuestOffset::new(10 * 4096)).is_err());
}

#[test]
fn exceptions_go_on_in_the_next_area_and_memory_is_bounded_by_windows() {
    // Chunks of 8 sectors have areas of 256 exceptions.
    let changed: Vec<_> = (0..1000u64).map(|n| (n * 617 % 1000, 7)).collect();
    let source = source(store(8, &changed));
    let store = open(&source, 2000 * 4096).unwrap();
    let whole = store.changes().unwrap();
    assert_eq!(whole.windows.len(), 1);
    let parts = store.changes_within(100).unwrap();
    assert_eq!(parts.windows.len(), 10);
    let at = |changes: &Changes<'_>, chunk: u64| {
        let run = changes.at(GuestOffset::new(chunk * 4096)).unwrap();
        run.place.map(HostOffset::get)
    };
    let mut wanted = vec![None; 2000];
    for (index, (old, _)) in (0u64..).zip(changed) {
        let new = 2 + index / 256 * 257 + index % 256;
        wanted[usize::try_from(old).unwrap()] = Some(START + new * 4096);
    }
    for (chunk, wanted) in (0..).zip(&wanted) {
        assert_eq!(at(&whole, chunk), *wanted, "{chunk}");
        assert_eq!(at(&parts, chunk), *wanted, "{chunk}");
    }
    // The windows are read again where somebody goes back.
    for (chunk, wanted) in (0..2000).rev().zip(wanted.iter().rev()) {
        assert_eq!(at(&parts, chunk), *wanted, "{chunk}");
    }
    let changed = |(start, end, place): &(u64, u64, Option<u64>)| place.map_or(0, |_| end - start);
    assert_eq!(runs(&parts).iter().map(changed).sum::<u64>(), 1000 * 4096);
}

#[test]
fn a_store_that_overflowed_is_refused_by_name() {
    let mut bytes = store(8, &[(1, 1)]);
    bytes[usize::try_from(START).unwrap() + 4] = 0;
    let error = failure(bytes, 1 << 20);
    assert!(matches!(error.kind(), ErrorKind::InvalidImage(_)), "{error}");
    assert!(error.to_string().contains("overflowed"), "{error}");
}

#[test]
fn a_header_that_is_none_is_refused() {
    let base = usize::try_from(START).unwrap();
    let sound = store(8, &[(1, 1)]);
    let with = |at: usize, word: u32| {
        let mut bytes = sound.clone();
        bytes[base + at..base + at + 4].copy_from_slice(&word.to_le_bytes());
        failure(bytes, 1 << 20)
    };
    assert!(with(0, 0x1234).to_string().contains("0x00001234"));
    assert!(matches!(with(8, 2).kind(), ErrorKind::Unsupported(_)));
    for sectors in [0, 3, 9, 1 << 22, u32::MAX] {
        assert!(with(12, sectors).to_string().contains(&sectors.to_string()), "{sectors}");
    }
    // A chunk larger than the file: no area can be in it.
    assert!(with(12, 2048).to_string().contains("cut off"));
    assert!(failure(vec![0; base + 8], 1 << 20).to_string().contains("truncated"));
}

#[test]
fn exceptions_outside_of_the_disk_or_the_store_are_refused() {
    let outside = failure(store(8, &[(255, 1), (256, 1)]), 1 << 20);
    assert!(outside.to_string().contains("chunk 256 "), "{outside}");
    assert_eq!(outside.offset(), Some(START + 4096 + 16));
    assert!(failure(store(8, &[(u64::MAX, 1)]), 1 << 20).to_string().contains("the disk has 256"));
    let length = u64::try_from(store(8, &[(1, 1), (2, 1)]).len()).unwrap();
    for (new, what) in [
        ((length - START) / 4096, "past its end"),
        (u64::MAX, "past its end"),
        (1, "for exceptions"),
    ] {
        let mut bytes = store(8, &[(1, 1), (2, 1)]);
        put_new(&mut bytes, 8, 1, new);
        let error = failure(bytes, 1 << 20);
        assert!(error.to_string().contains(what), "{new}: {error}");
    }
}

#[test]
fn a_chunk_that_is_changed_twice_is_refused() {
    assert!(failure(store(8, &[(1, 1), (5, 1), (1, 1)]), 1 << 20).to_string().contains("twice"));
    // Where several chunks are counted together it shows once they are sorted.
    let source = source(store(8, &[(1, 1), (5, 1), (1, 1)]));
    let changes = open(&source, 1 << 40).unwrap().changes().unwrap();
    let error = changes.at(GuestOffset::ZERO).unwrap_err();
    assert!(error.to_string().contains("twice"), "{error}");
    assert_eq!(changes.runs().filter(Result::is_err).count(), 1);
}

#[test]
fn a_store_without_end_ends_with_its_file() {
    // All areas are full, and the next one is not there.
    let mut bytes = store(8, &(0..256).map(|n| (n, 1)).collect::<Vec<_>>());
    bytes.truncate(bytes.len() - 4096);
    assert!(failure(bytes, 1 << 20).to_string().contains("cut off"));
}

#[test]
fn more_than_can_be_sorted_is_refused_by_name() {
    let source = source(store(8, &(0..40).map(|n| (n, 1)).collect::<Vec<_>>()));
    let store = open(&source, 1 << 40).unwrap();
    let error = store.changes_within(39).unwrap_err();
    assert!(error.to_string().contains("more than 39 chunks"), "{error}");
    assert!(store.changes_within(40).is_ok());
}

/// What `check` says of a store whose pairs in the first area are these.
fn checked(sectors: u32, disk: u64, pairs: &[(u64, u64)], limits: Limits) -> Result<()> {
    let mut bytes = store(sectors, &vec![(0, 1); pairs.len()]);
    for (slot, &(old, new)) in pairs.iter().enumerate() {
        let at = usize::try_from(START).unwrap() + sectors as usize * 512 + slot * 16;
        bytes[at..at + 8].copy_from_slice(&old.to_le_bytes());
        put_new(&mut bytes, sectors as usize, slot, new);
    }
    let source = source(bytes);
    open(&source, disk).and_then(|store| store.check_within(limits))
}

/// Bits for all numbers, several parts of them, and sorted.
const WAYS: [Limits; 3] = [
    Limits { bits: 1 << 30, sorted: 0, rounds: 1 },
    Limits { bits: 2, sorted: 0, rounds: 1 << 20 },
    Limits { bits: 1, sorted: 100, rounds: 0 },
];

#[test]
fn what_would_make_the_kernel_panic_is_refused() {
    // Its count of a run of chunks, in the upper bits of the second number, would go from 255
    // to 0.
    let error = checked(32, 1 << 20, &[(1, 0xff << 56 | 6), (0, 5)], WAYS[0]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::InvalidImage(_)), "{error}");
    assert!(error.to_string().contains("past its end"), "{error}");
    assert_eq!(error.offset(), Some(START + 32 * 512));
}

#[test]
fn no_chunk_of_the_disk_or_the_store_is_named_twice() {
    for limits in WAYS {
        checked(8, 1 << 20, &[], limits).unwrap();
        checked(8, 1 << 20, &[(9, 3), (200, 2), (3, 5), (0, 4)], limits).unwrap();
        let said =
            |pairs: &[(u64, u64)]| checked(8, 1 << 20, pairs, limits).unwrap_err().to_string();
        let old = said(&[(9, 3), (200, 2), (9, 5), (0, 4)]);
        assert!(old.contains("chunk 9 of the disk is named twice"), "{limits:?}: {old}");
        let new = said(&[(9, 3), (200, 2), (3, 4), (0, 4)]);
        assert!(new.contains("chunk 4 of the store is named twice"), "{limits:?}: {new}");
    }
    let far = Limits { bits: 2, sorted: 0, rounds: 2 };
    let error = checked(8, 1 << 20, &[(9, 3), (200, 2), (100, 4)], far).unwrap_err();
    assert!(error.to_string().contains("too far apart"), "{error}");
}

#[test]
fn what_the_kernel_writes_is_sound_to_the_last_area() {
    let changed: Vec<_> = (0..1000u64).map(|n| (n * 617 % 1000, 7)).collect();
    let bytes = store(8, &changed);
    for disk in [1000 * 4096, 1 << 60] {
        open(&source(bytes.clone()), disk).unwrap().check().unwrap();
    }
    let cut = bytes[..bytes.len() - 4096].to_vec();
    let error = open(&source(cut), 1000 * 4096).unwrap().check().unwrap_err();
    assert!(error.to_string().contains("past its end"), "{error}");
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_it_panic_or_run_on(
        pairs in proptest::collection::vec((0u64..300, 0u64..300), 0..300),
        damage in proptest::collection::vec((0usize..8192, 0u8..=255), 0..3),
        disk in (0u32..64).prop_map(|shift| 1u64 << shift),
    ) {
        let mut all = store(8, &[(0, 0); 256]);
        let area = usize::try_from(START).unwrap() + 4096;
        for (slot, (old, new)) in pairs.iter().take(256).enumerate() {
            let at = area + slot * 16;
            all[at..at + 8].copy_from_slice(&old.to_le_bytes());
            all[at + 8..at + 16].copy_from_slice(&new.to_le_bytes());
        }
        for (at, byte) in damage {
            all[usize::try_from(START).unwrap() + at] = byte;
        }
        let source = source(all);
        if let Ok(changes) = open(&source, disk).and_then(ExceptionStore::changes) {
            let mut end = 0;
            for run in changes.runs().take(1000).map_while(Result::ok) {
                prop_assert_eq!(run.range.start.get(), end);
                end = run.range.end.get();
            }
        }
    }
}
