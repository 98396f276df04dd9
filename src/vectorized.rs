//! Loops over many values, done several values at a time.

/// Does `work`, a loop without decisions, with AVX2 where this processor has it: with what every
/// x86-64 has, a table is decoded at a third of the speed. (AVX-512 is no faster here, and slows
/// some processors down for a while; that of ARM is in every 64-bit one.)
///
/// What `work` calls is done so only where it is inlined: it and the closures that it is given are
/// to be `#[inline(always)]`. What it uses is best moved into it: what lies behind a reference might
/// change with what it writes.
#[inline(always)]
pub(crate) fn vectorized<T>(work: impl FnOnce() -> T) -> T {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    if let Some(avx2) = fearless_simd::Level::new().as_avx2() {
        return fearless_simd::Simd::vectorize(avx2, work);
    }
    work()
}

#[cfg(all(test, miri, target_arch = "x86_64"))]
mod tests {
    /// Miri has it for what it is compiled for: all tests of what is vectorized rest on that.
    #[test]
    fn miri_is_given_avx2() {
        assert!(fearless_simd::Level::new().as_avx2().is_some());
    }
}
