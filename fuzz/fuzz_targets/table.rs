#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| imgdm_fuzz::texts::table(bytes));
