//! How far a copy is.

use std::sync::Mutex;

use crate::cli::Globals;
use crate::cli::progress::Progress;

/// How far it is: a bar on a terminal, or lines.
pub(crate) struct Meter {
    bar: Option<Progress>,
    size: u64,
    /// The percentage that was printed last, in hundredths.
    printed: Option<Mutex<u64>>,
}

impl Meter {
    /// As lines on stderr where asked for.
    pub(crate) fn start(lines: bool, size: u64, what: &'static str, globals: Globals) -> Self {
        let lines = lines && !globals.quiet;
        let bar = (!lines).then(|| Progress::start(true, size, what, globals));
        let meter = Self { bar, size, printed: lines.then(|| Mutex::new(u64::MAX)) };
        meter.set(0);
        meter
    }

    /// Tells up to which byte the disk is done.
    pub(crate) fn set(&self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set(done);
        }
        let Some(printed) = &self.printed else { return };
        let done = u128::from(done) * 100 / u128::from(self.size.max(1));
        let percent = u64::try_from(done).unwrap_or(100).min(100);
        let Ok(mut printed) = printed.lock() else { return };
        if *printed == u64::MAX || percent > *printed {
            *printed = percent;
            // A closed stderr must not stop the work.
            let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{percent}%\n"));
        }
    }

    /// The end, of all of it or of a part.
    pub(crate) fn finish(self, all: bool) {
        if all {
            self.set(self.size);
        }
        if let Some(bar) = self.bar {
            bar.finish();
        }
    }
}
