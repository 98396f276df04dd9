//! Encrypted images: what their headers say of cipher and key, and how a passphrase
//! becomes the volume's key. On a device the kernel's dm-crypt decrypts the data; what is
//! read in user space is decrypted here ([`SectorCipher`]).

mod cipher;
mod luks;
#[cfg(test)]
mod tests;

use std::fmt;

use zeroize::{Zeroize, Zeroizing};

use crate::error::Result;
use crate::source::Source;
use crate::status::Encryption;

pub use cipher::SectorCipher;
pub(crate) use luks::LUKS_HEADER_BYTES;
pub use luks::{LuksFacts, LuksHeader, LuksSlotFacts};

/// Bytes of the key of legacy AES (QEMU: qcrypto_block_qcow_init() in crypto/block-qcow.c).
const LEGACY_KEY_BYTES: usize = 16;

/// What a person or a file gives as the key of an image. Wiped when it is dropped.
pub struct Passphrase(Zeroizing<Vec<u8>>);

impl Passphrase {
    /// These bytes, as they are.
    pub fn new(bytes: Zeroizing<Vec<u8>>) -> Self {
        Self(bytes)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(..)")
    }
}

/// The key that the data is encrypted with. Wiped when it is dropped.
pub struct VolumeKey(Zeroizing<Vec<u8>>);

impl VolumeKey {
    /// The bytes, as many as the cipher takes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VolumeKey(..)")
    }
}

/// How an image is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CryptHeader {
    /// Method 1 (qcow and qcow2): AES-128-CBC, IV from the guest sector, the passphrase
    /// itself as the key.
    Aes,
    /// Method 2 (qcow2): a LUKS1 header inside of the image, IV from the host sector.
    Luks(Box<LuksHeader>),
}

impl CryptHeader {
    /// Which of the two.
    pub fn encryption(&self) -> Encryption {
        match self {
            Self::Aes => Encryption::Aes,
            Self::Luks(_) => Encryption::Luks,
        }
    }

    /// The cipher as a dm-crypt table names it, like `aes-xts-plain64`.
    pub fn cipher_spec(&self) -> String {
        match self {
            Self::Aes => "aes-cbc-plain64".to_owned(),
            Self::Luks(header) => header.cipher_spec(),
        }
    }

    /// Bytes of the volume's key.
    pub fn key_bytes(&self) -> usize {
        match self {
            Self::Aes => LEGACY_KEY_BYTES,
            Self::Luks(header) => header.key_bytes(),
        }
    }

    /// False where no key at all opens it: a LUKS header whose key slots are all erased.
    pub fn has_key(&self) -> bool {
        match self {
            Self::Aes => true,
            Self::Luks(header) => header.has_key(),
        }
    }

    /// The volume's key by a passphrase. Legacy AES can't tell a wrong one.
    ///
    /// # Errors
    /// `WrongKey` where no key slot opens; a read failed.
    pub fn unlock(&self, source: &Source, passphrase: &Passphrase) -> Result<VolumeKey> {
        let key = match self {
            Self::Aes => Ok(legacy_key(passphrase)),
            Self::Luks(header) => header.unlock(source, passphrase),
        };
        burn_stack();
        key
    }
}

/// QEMU takes the passphrase as a C string, and cuts or pads it with zeros.
fn legacy_key(passphrase: &Passphrase) -> VolumeKey {
    let mut key = Zeroizing::new(vec![0; LEGACY_KEY_BYTES]);
    let bytes = passphrase.bytes().iter().take_while(|&&byte| byte != 0);
    for (to, from) in key.iter_mut().zip(bytes) {
        *to = *from;
    }
    VolumeKey(key)
}

/// Wipes the part of the stack where ciphers and hashes had their state: they are moved
/// about there, and only their last place is wiped when they are dropped.
#[inline(never)]
fn burn_stack() {
    let mut stack = [0u8; 64 << 10];
    stack.zeroize();
    std::hint::black_box(&stack);
}
