//! How far long work is, on a terminal; a build without the feature `device` shows nothing.

use super::Globals;

/// A bar on stderr while it lives.
pub(crate) struct Progress {
    #[cfg(feature = "device")]
    bar: Option<indicatif::ProgressBar>,
}

#[cfg(feature = "device")]
impl Progress {
    /// For so many bytes, unless `shown` is false.
    pub(crate) fn start(shown: bool, bytes: u64, what: &'static str, globals: Globals) -> Self {
        Self { bar: shown.then(|| globals.progress(bytes, what)) }
    }

    /// So many are done.
    pub(crate) fn set(&self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(not(feature = "device"))]
#[allow(clippy::unused_self)]
impl Progress {
    pub(crate) fn start(_: bool, _: u64, _: &'static str, _: Globals) -> Self {
        Self {}
    }

    pub(crate) fn set(&self, _: u64) {}

    pub(crate) fn finish(self) {}
}
