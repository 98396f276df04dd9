//! Decrypting sectors in user space: LUKS key material, and whatever is to be read
//! without the kernel.
//!
//! The modes are written out over any block cipher: crates for them are generic over one
//! cipher each, which would make a type of every pair.

use cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};
use digest::Digest;
use zeroize::Zeroizing;

use super::{CryptHeader, VolumeKey};
use crate::error::{Error, ErrorKind, Result};
use crate::units::SECTOR_SIZE;

/// The longest block of all ciphers.
const MAX_BLOCK: usize = 16;

/// A block cipher by LUKS's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    Aes,
    Cast5,
    Serpent,
    Twofish,
    Sm4,
}

/// A hash by LUKS's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hash {
    Md5,
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Ripemd160,
    Sm3,
}

/// How blocks are chained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chaining {
    Ecb,
    Cbc,
    Ctr,
    Xts,
}

/// How a sector's number becomes its IV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IvGenerator {
    /// The low 32 bits of the number.
    Plain,
    /// The number.
    Plain64,
    /// The number, encrypted with the key's hash.
    Essiv(Hash),
}

/// A whole cipher specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CipherSpec {
    pub(super) algorithm: Algorithm,
    pub(super) chaining: Chaining,
    pub(super) iv: IvGenerator,
}

/// `use_hash!(hash, H => expression)`, with `H` the type of the hash.
macro_rules! use_hash {
    ($hash:expr, $H:ident => $body:expr) => {
        match $hash {
            Hash::Md5 => {
                type $H = md5::Md5;
                $body
            }
            Hash::Sha1 => {
                type $H = sha1::Sha1;
                $body
            }
            Hash::Sha224 => {
                type $H = sha2::Sha224;
                $body
            }
            Hash::Sha256 => {
                type $H = sha2::Sha256;
                $body
            }
            Hash::Sha384 => {
                type $H = sha2::Sha384;
                $body
            }
            Hash::Sha512 => {
                type $H = sha2::Sha512;
                $body
            }
            Hash::Ripemd160 => {
                type $H = ripemd::Ripemd160;
                $body
            }
            Hash::Sm3 => {
                type $H = sm3::Sm3;
                $body
            }
        }
    };
}

impl Algorithm {
    pub(super) fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "aes" => Self::Aes,
            "cast5" => Self::Cast5,
            "serpent" => Self::Serpent,
            "twofish" => Self::Twofish,
            "sm4" => Self::Sm4,
            _ => return None,
        })
    }

    pub(super) fn takes_key(self, bytes: usize) -> bool {
        match self {
            Self::Aes | Self::Serpent | Self::Twofish => matches!(bytes, 16 | 24 | 32),
            Self::Cast5 | Self::Sm4 => bytes == 16,
        }
    }

    pub(super) fn block_bytes(self) -> usize {
        if self == Self::Cast5 { 8 } else { MAX_BLOCK }
    }

    fn with_key(self, key: &[u8]) -> Option<Box<dyn Block>> {
        Some(match (self, key.len()) {
            (Self::Aes, 16) => boxed::<aes::Aes128>(key)?,
            (Self::Aes, 24) => boxed::<aes::Aes192>(key)?,
            (Self::Aes, _) => boxed::<aes::Aes256>(key)?,
            (Self::Cast5, _) => boxed::<cast5::Cast5>(key)?,
            (Self::Serpent, _) => boxed::<serpent::Serpent>(key)?,
            (Self::Twofish, _) => boxed::<twofish::Twofish>(key)?,
            (Self::Sm4, _) => boxed::<sm4::Sm4>(key)?,
        })
    }
}

impl Hash {
    pub(super) fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "md5" => Self::Md5,
            "sha1" => Self::Sha1,
            "sha224" => Self::Sha224,
            "sha256" => Self::Sha256,
            "sha384" => Self::Sha384,
            "sha512" => Self::Sha512,
            "ripemd160" => Self::Ripemd160,
            "sm3" => Self::Sm3,
            _ => return None,
        })
    }

    /// The digest of the parts, one after the other.
    pub(super) fn digest(self, parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        use_hash!(self, H => {
            let mut hash = H::new();
            for part in parts {
                hash.update(part);
            }
            let mut digest = hash.finalize();
            let out = Zeroizing::new(digest.to_vec());
            zeroize::Zeroize::zeroize(digest.as_mut_slice());
            out
        })
    }

    pub(super) fn digest_bytes(self) -> usize {
        use_hash!(self, H => H::output_size())
    }

    /// PBKDF2 with HMAC (RFC 8018); fills `out`.
    pub(super) fn pbkdf2(self, password: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        use_hash!(self, H => pbkdf2::pbkdf2_hmac::<H>(password, salt, iterations, out));
    }
}

impl CipherSpec {
    /// Reads LUKS's names: `aes`, and `xts-plain64` or `cbc-essiv:sha256`. `None` for what
    /// is not known.
    pub(super) fn parse(name: &str, mode: &str) -> Option<Self> {
        let algorithm = Algorithm::parse(name)?;
        let (chaining, iv) = mode.split_once('-')?;
        let chaining = match chaining {
            "ecb" => Chaining::Ecb,
            "cbc" => Chaining::Cbc,
            "ctr" => Chaining::Ctr,
            "xts" => Chaining::Xts,
            _ => return None,
        };
        let iv = match iv.split_once(':') {
            None if iv == "plain" => IvGenerator::Plain,
            None if iv == "plain64" => IvGenerator::Plain64,
            Some(("essiv", hash)) => IvGenerator::Essiv(Hash::parse(hash)?),
            _ => return None,
        };
        let has_xts_block = algorithm.block_bytes() == MAX_BLOCK;
        let known = (chaining != Chaining::Xts || has_xts_block)
            && match iv {
                IvGenerator::Essiv(hash) => algorithm.takes_key(hash.digest_bytes()),
                _ => true,
            };
        known.then_some(Self { algorithm, chaining, iv })
    }

    /// Bits of the block cipher's own key, where the volume's has so many bytes.
    pub(super) fn key_bits(self, bytes: usize) -> usize {
        let own = if self.chaining == Chaining::Xts { bytes / 2 } else { bytes };
        own.saturating_mul(8)
    }

    /// True for as many bytes as the cipher's key has: XTS takes two keys.
    pub(super) fn takes_key(self, bytes: usize) -> bool {
        match self.chaining {
            Chaining::Xts => bytes.is_multiple_of(2) && self.algorithm.takes_key(bytes / 2),
            _ => self.algorithm.takes_key(bytes),
        }
    }
}

/// A block cipher with its key.
trait Block: Send + Sync {
    fn encrypt(&self, block: &mut [u8]);
    fn decrypt(&self, block: &mut [u8]);
}

impl<C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser + Send + Sync> Block for C {
    fn encrypt(&self, block: &mut [u8]) {
        if let Ok(block) = <&mut Array<u8, C::BlockSize>>::try_from(block) {
            self.encrypt_block(block);
        }
    }

    fn decrypt(&self, block: &mut [u8]) {
        if let Ok(block) = <&mut Array<u8, C::BlockSize>>::try_from(block) {
            self.decrypt_block(block);
        }
    }
}

fn boxed<C: KeyInit + Block + 'static>(key: &[u8]) -> Option<Box<dyn Block>> {
    Some(Box::new(C::new_from_slice(key).ok()?))
}

/// Decrypts sectors of 512 bytes, as dm-crypt does.
pub struct SectorCipher {
    spec: CipherSpec,
    data: Box<dyn Block>,
    /// The second key of XTS, or what makes the IVs of ESSIV.
    iv: Option<Box<dyn Block>>,
    /// XTS with ESSIV needs a third.
    tweak: Option<Box<dyn Block>>,
}

impl std::fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SectorCipher").field("spec", &self.spec).finish_non_exhaustive()
    }
}

impl SectorCipher {
    /// The cipher of an image, with its key.
    ///
    /// # Errors
    /// The key is not as long as the cipher's.
    pub fn new(header: &CryptHeader, key: &VolumeKey) -> Result<Self> {
        let spec = match header {
            CryptHeader::Aes => CipherSpec {
                algorithm: Algorithm::Aes,
                chaining: Chaining::Cbc,
                iv: IvGenerator::Plain64,
            },
            CryptHeader::Luks(header) => header.cipher(),
        };
        Self::with_key(spec, key.bytes())
    }

    pub(super) fn with_key(spec: CipherSpec, key: &[u8]) -> Result<Self> {
        let wrong = || Error::new(ErrorKind::WrongKey(format!("a key of {} bytes", key.len())));
        if !spec.takes_key(key.len()) {
            return Err(wrong());
        }
        let algorithm = spec.algorithm;
        let (data, tweak) = match spec.chaining {
            Chaining::Xts => {
                let (data, tweak) = key.split_at(key.len() / 2);
                (data, Some(algorithm.with_key(tweak).ok_or_else(wrong)?))
            }
            _ => (key, None),
        };
        let iv = match spec.iv {
            IvGenerator::Essiv(hash) => {
                Some(algorithm.with_key(&hash.digest(&[key])).ok_or_else(wrong)?)
            }
            IvGenerator::Plain | IvGenerator::Plain64 => None,
        };
        Ok(Self { spec, data: algorithm.with_key(data).ok_or_else(wrong)?, iv, tweak })
    }

    /// Decrypts `data`, whole sectors of which the first has the number `first_sector`. A
    /// part of a sector at the end is decrypted as far as it has whole blocks.
    pub fn decrypt(&self, first_sector: u64, data: &mut [u8]) {
        let sector_bytes = usize::try_from(SECTOR_SIZE).unwrap_or(512);
        for (number, sector) in (first_sector..).zip(data.chunks_mut(sector_bytes)) {
            let mut iv = self.initial(number);
            match self.spec.chaining {
                Chaining::Ecb => self.blocks(sector, |_| (), |_, _| ()),
                Chaining::Cbc => self.cbc(sector, &mut iv),
                Chaining::Ctr => self.ctr(sector, &mut iv),
                Chaining::Xts => self.xts(sector, &mut iv),
            }
        }
    }

    /// The IV of a sector (kernel: crypt_iv_*_gen() in drivers/md/dm-crypt.c).
    fn initial(&self, number: u64) -> [u8; MAX_BLOCK] {
        let mut iv = [0; MAX_BLOCK];
        let number = if self.spec.iv == IvGenerator::Plain { number & 0xffff_ffff } else { number };
        iv[..8].copy_from_slice(&number.to_le_bytes());
        if let Some(cipher) = &self.iv {
            cipher.encrypt(&mut iv[..self.spec.algorithm.block_bytes()]);
        }
        iv
    }

    fn blocks(
        &self,
        sector: &mut [u8],
        mut before: impl FnMut(&mut [u8]),
        mut after: impl FnMut(&mut [u8], [u8; MAX_BLOCK]),
    ) {
        for block in sector.chunks_exact_mut(self.spec.algorithm.block_bytes()) {
            let mut ciphertext = [0; MAX_BLOCK];
            ciphertext[..block.len()].copy_from_slice(block);
            before(block);
            self.data.decrypt(block);
            after(block, ciphertext);
        }
    }

    fn cbc(&self, sector: &mut [u8], iv: &mut [u8; MAX_BLOCK]) {
        let after = |block: &mut [u8], ciphertext| {
            xor(block, iv);
            *iv = ciphertext;
        };
        self.blocks(sector, |_| (), after);
    }

    fn ctr(&self, sector: &mut [u8], counter: &mut [u8; MAX_BLOCK]) {
        let length = self.spec.algorithm.block_bytes();
        for block in sector.chunks_mut(length) {
            let mut stream = *counter;
            self.data.encrypt(&mut stream[..length]);
            xor(block, &stream);
            for byte in counter[..length].iter_mut().rev() {
                *byte = byte.wrapping_add(1);
                if *byte != 0 {
                    break;
                }
            }
        }
    }

    fn xts(&self, sector: &mut [u8], tweak: &mut [u8; MAX_BLOCK]) {
        if let Some(cipher) = &self.tweak {
            cipher.encrypt(tweak);
        }
        for block in sector.chunks_exact_mut(MAX_BLOCK) {
            xor(block, tweak);
            self.data.decrypt(block);
            xor(block, tweak);
            // Times alpha in GF(2^128), little-endian (IEEE 1619, 5.2).
            let value = u128::from_le_bytes(*tweak);
            let carry = if value >> 127 == 1 { 0x87 } else { 0 };
            *tweak = ((value << 1) ^ carry).to_le_bytes();
        }
    }
}

fn xor(block: &mut [u8], with: &[u8]) {
    for (byte, with) in block.iter_mut().zip(with) {
        *byte ^= with;
    }
}
