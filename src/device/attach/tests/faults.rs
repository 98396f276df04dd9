//! Faults in whatever is asked of the kernel, while attaching and afterwards.

use super::above::leaked;
use super::*;
use crate::device::verify::Verifier;

/// Two partitions in its first sector.
fn fixture() -> Fixture {
    let mut start = [0; 512];
    for (at, first, length) in [(446, 8u32, 16u32), (462, 24, 8)] {
        start[at + 4] = 0x83;
        start[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
        start[at + 12..at + 16].copy_from_slice(&length.to_le_bytes());
    }
    start[510..].copy_from_slice(&[0x55, 0xaa]);
    Fixture::with_start(&start)
}

fn with_partitions(fixture: &Fixture, kernel: &FakeKernel) -> Result<Attachment, AttachError> {
    let above = leaked(Above { partitions: Partitions::All, ..Above::default() });
    fixture.attach_with(kernel, |request| request.above = above)
}

/// How much was asked so far: what changes something, and what does not.
fn asked(kernel: &FakeKernel) -> (usize, usize) {
    kernel.with(|state| (state.calls.len(), state.queries.len()))
}

fn detach_disk(kernel: &FakeKernel) -> crate::Result<()> {
    let target = find(kernel, "disk".as_ref(), None)?;
    detach(kernel, &target, false, &Interrupt::never())
}

/// The only attachment, taken away, after which there is nothing.
#[track_caller]
fn assert_detaches(kernel: &FakeKernel) {
    detach_disk(kernel).unwrap();
    assert!(is_empty(kernel), "{kernel:?}");
}

#[test]
fn a_query_that_fails_while_attaching_leaves_nothing_or_a_whole_attachment() {
    let fixture = fixture();
    let mut refused = 0;
    for query in 0.. {
        let kernel = FakeKernel::new();
        kernel.fail_query_at(query);
        let attached = with_partitions(&fixture, &kernel);
        let was_reached = asked(&kernel).1 > query;
        kernel.mend();
        match attached {
            Err(error) => {
                assert!(error.cause.to_string().contains("fault injected"), "{query}: {error}");
                assert!(error.leftovers.is_empty(), "{query}: {error}");
                assert!(is_empty(&kernel), "{query}: {kernel:?}");
                refused += 1;
            }
            // Not all that is asked decides.
            Ok(attached) => {
                assert_eq!(attached.above.len(), 2, "{query}");
                assert_detaches(&kernel);
            }
        }
        if !was_reached {
            break;
        }
    }
    assert!(refused > 5, "only {refused} queries matter");
}

#[test]
fn a_query_that_fails_while_attaching_again_changes_nothing() {
    let (kernel, fixture) = (FakeKernel::new(), fixture());
    with_partitions(&fixture, &kernel).unwrap();
    for query in 0.. {
        let (calls, queries) = asked(&kernel);
        kernel.fail_query_at(queries + query);
        let again = with_partitions(&fixture, &kernel);
        let was_reached = asked(&kernel).1 > queries + query;
        kernel.mend();
        if let Err(error) = &again {
            assert!(error.cause.to_string().contains("fault injected"), "{query}: {error}");
        }
        let changes = kernel.with(|state| state.calls[calls..].join(", "));
        assert!(!changes.contains("create") && !changes.contains("remove"), "{query}: {changes}");
        assert_eq!(kernel.with(|state| (state.devices.len(), state.loops.len())), (4, 4));
        if !was_reached {
            break;
        }
    }
    assert_detaches(&kernel);
}

#[test]
fn what_fails_after_a_failure_does_not_hide_it_and_a_later_run_clears_away() {
    let fixture = fixture();
    let steps = {
        let kernel = FakeKernel::new();
        with_partitions(&fixture, &kernel).unwrap();
        asked(&kernel).0
    };
    for step in 0..steps {
        let kernel = FakeKernel::new();
        kernel.fail_from(step);
        let error = with_partitions(&fixture, &kernel).unwrap_err();
        let wanted = format!("fault injected into call {step}");
        assert!(error.cause.to_string().contains(&wanted), "{step}: {error}");
        kernel.mend();
        // What could not be removed is told. It has a table only where it was committed.
        kernel.with(|state| {
            let told = |name: &str| error.leftovers.iter().any(|left| left.contains(name));
            let is_committed = state.calls[..step].iter().any(|call| call == "cancel disk");
            assert!(state.devices.values().all(|device| told(&device.name)), "{step}: {error}");
            assert_eq!(state.devices.is_empty(), error.leftovers.is_empty(), "{step}: {error}");
            assert_eq!(state.loops.len(), if is_committed { 4 } else { 0 }, "{step}");
            let is_live = state.devices.values().any(|device| device.live.is_some());
            assert_eq!(is_live, is_committed, "{step}");
        });
        with_partitions(&fixture, &kernel).unwrap();
        assert_detaches(&kernel);
    }
}

#[test]
fn a_failure_at_any_step_of_detaching_can_be_tried_again() {
    let fixture = fixture();
    type Fail = fn(&FakeKernel, usize);
    let faults: [(&str, Fail); 2] =
        [("call", FakeKernel::fail_at), ("query", FakeKernel::fail_query_at)];
    for (what, fail) in faults {
        for step in 0.. {
            let kernel = FakeKernel::new();
            with_partitions(&fixture, &kernel).unwrap();
            let (calls, queries) = asked(&kernel);
            let first = if what == "call" { calls } else { queries };
            fail(&kernel, first + step);
            let gone = detach_disk(&kernel);
            let (calls, queries) = asked(&kernel);
            let was_reached = if what == "call" { calls } else { queries } > first + step;
            kernel.mend();
            match gone {
                Ok(()) => assert!(is_empty(&kernel), "{what} {step}: {kernel:?}"),
                Err(error) => {
                    assert!(error.to_string().contains("fault injected"), "{what} {step}: {error}");
                    // The disk is there, under its name, and so is all below it.
                    assert_eq!(list(&kernel).unwrap().len(), 1, "{what} {step}");
                    assert_eq!(kernel.with(|state| state.loops.len()), 4, "{what} {step}");
                    assert_detaches(&kernel);
                }
            }
            if !was_reached {
                break;
            }
        }
    }
}

#[test]
fn looking_with_any_query_failing_changes_nothing() {
    let (kernel, fixture) = (FakeKernel::new(), fixture());
    with_partitions(&fixture, &kernel).unwrap();
    type Look = fn(&FakeKernel) -> crate::Result<()>;
    let looks: [Look; 3] = [
        |kernel| list(kernel).map(drop),
        |kernel| find(kernel, "disk".as_ref(), None).map(drop),
        |kernel| {
            let attached = find(kernel, "disk".as_ref(), None)?;
            Verifier::open(kernel, attached, None).map(drop)
        },
    ];
    let before = kernel.with(|state| format!("{:?} {:?}", state.devices, state.loops));
    for look in looks {
        for query in 0.. {
            let first = asked(&kernel).1;
            kernel.fail_query_at(first + query);
            if let Err(error) = look(&kernel) {
                assert!(error.to_string().contains("fault injected"), "{query}: {error}");
            }
            let was_reached = asked(&kernel).1 > first + query;
            kernel.mend();
            let after = kernel.with(|state| format!("{:?} {:?}", state.devices, state.loops));
            assert_eq!(after, before, "{query}");
            if !was_reached {
                break;
            }
        }
    }
    assert_detaches(&kernel);
}
