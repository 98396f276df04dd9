//! Nothing here yet but what zeros are found.

use super::detect::Detector;

fn runs(sparse: usize, granularity: usize, bytes: &[u8]) -> Vec<(usize, bool)> {
    let mut runs = Vec::new();
    Detector { sparse, granularity }.for_each_run(0, bytes, &mut |length, is_data| {
        runs.push((length, is_data));
    });
    runs
}

#[test]
fn zeros_are_found_by_granules_where_those_are_long_enough() {
    let mut bytes = vec![0; 5 * 4096 + 512];
    bytes[4096 + 7] = 1;
    bytes[5 * 4096] = 1;
    assert_eq!(
        runs(4096, 4096, &bytes),
        [(4096, false), (4096, true), (3 * 4096, false), (512, true)]
    );
    assert_eq!(runs(512, 4096, &bytes), runs(4096, 4096, &bytes));
}

#[test]
fn zeros_shorter_than_asked_for_are_data_between_data() {
    let mut bytes = vec![0; 16 * 4096];
    bytes[4096] = 1;
    bytes[3 * 4096] = 1;
    bytes[15 * 4096] = 1;
    let k = 4096;
    // Data up to a multiple of 16k; the zeros behind it are long enough.
    assert_eq!(runs(4 * k, k, &bytes), [(4 * k, true), (8 * k, false), (4 * k, true)]);
    assert_eq!(runs(16 * k, k, &bytes), [(16 * k, true)]);
}
