//! Keys for the commands that read the disk's content themselves, in user space.

use std::collections::BTreeSet;

use imgdm::chain::Chain;
use imgdm::device::Interrupt;
use imgdm::read::Ciphers;

#[cfg(feature = "device")]
use super::key::{KeyArgs, KeySources, encrypted_layers};
#[cfg(feature = "device")]
use super::{signal, table::device_name, workers};

/// The arguments that give keys; none in a build without the feature `device`.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct UnlockArgs {
    #[cfg(feature = "device")]
    #[command(flatten)]
    keys: KeyArgs,
}

/// Where the keys come from.
pub(crate) struct Unlocker {
    #[cfg(feature = "device")]
    sources: KeySources,
}

/// Unlocked layers, and what tells of signals: once a person may have been asked for a
/// passphrase they do not end the process by themselves.
pub(crate) struct Unlocked {
    pub(crate) ciphers: Ciphers,
    pub(crate) interrupt: Interrupt<'static>,
}

impl UnlockArgs {
    /// The places that the arguments name. To be called before any file is opened, and
    /// before anything runs on worker threads.
    pub(crate) fn unlocker(&self) -> anyhow::Result<Unlocker> {
        #[cfg(feature = "device")]
        workers::prepare()?;
        Ok(Unlocker {
            #[cfg(feature = "device")]
            sources: KeySources::new(&self.keys)?,
        })
    }
}

impl Unlocker {
    /// True where an argument gives a key.
    pub(crate) fn is_given_keys(&self) -> bool {
        #[cfg(feature = "device")]
        return self.sources.are_given();
        #[cfg(not(feature = "device"))]
        false
    }

    /// Unlocks the layers of `chain` at these depths, asking for each key once.
    #[cfg(feature = "device")]
    pub(crate) fn unlock(self, chain: &Chain, depths: &BTreeSet<u32>) -> anyhow::Result<Unlocked> {
        self.sources.check_all_used(&encrypted_layers(chain))?;
        let mut ciphers = Ciphers::new();
        if depths.is_empty() {
            return Ok(Unlocked { ciphers, interrupt: Interrupt::never() });
        }
        let interrupt = signal::catch()?;
        let device = device_name(chain, None).ok();
        for &depth in depths {
            let Some(layer) = chain.layers().get(depth as usize) else { continue };
            let Some(header) = layer.image.crypt_header()? else { continue };
            let sources = &self.sources;
            let key = sources.unlock(device.as_ref(), depth, &header, &layer.source, &interrupt)?;
            ciphers.insert(depth, &header, &key)?;
        }
        Ok(Unlocked { ciphers, interrupt })
    }

    /// Unlocks nothing: reading an encrypted layer says that its key is missing.
    #[cfg(not(feature = "device"))]
    #[allow(clippy::unused_self, clippy::unnecessary_wraps)]
    pub(crate) fn unlock(self, _: &Chain, _: &BTreeSet<u32>) -> anyhow::Result<Unlocked> {
        Ok(Unlocked { ciphers: Ciphers::new(), interrupt: Interrupt::never() })
    }
}
