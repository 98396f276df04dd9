//! Encrypted images of the test's own making. qemu-img measures the hash's speed for two
//! seconds whenever it makes a LUKS header, which is too long for hundreds; QEMU reads any.

use std::path::Path;

use cipher::{BlockCipherEncrypt, KeyInit};
use digest::Digest;

use crate::common::patch::{
    BACKING_OFFSET, CRYPT_METHOD, FEATURE_NAMES, HEADER_LENGTH, Patch, VERSION,
};
use crate::common::process::Outcome;
use crate::common::rng::Rng;

/// The header extension that says where the LUKS header is.
const CRYPTO_HEADER: u32 = 0x0537_be77;
const STRIPES: usize = 4000;

/// A cipher as LUKS names it.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub(crate) cipher: &'static str,
    /// Bytes of the volume's key, both halves of it with XTS.
    pub(crate) key_bytes: usize,
    /// Like `xts-plain64`.
    pub(crate) mode: String,
    pub(crate) hash: &'static str,
}

type BlockCipher = Box<dyn Fn(&mut [u8])>;

fn keyed<C: KeyInit + BlockCipherEncrypt + 'static>(key: &[u8]) -> BlockCipher {
    let cipher = C::new_from_slice(key).unwrap();
    Box::new(move |block| cipher.encrypt_block(block.try_into().unwrap()))
}

fn block_cipher(name: &str, key: &[u8]) -> BlockCipher {
    match (name, key.len()) {
        ("aes", 16) => keyed::<aes::Aes128>(key),
        ("aes", 24) => keyed::<aes::Aes192>(key),
        ("aes", 32) => keyed::<aes::Aes256>(key),
        ("cast5", 16) => keyed::<cast5::Cast5>(key),
        ("serpent", _) => keyed::<serpent::Serpent>(key),
        ("twofish", _) => keyed::<twofish::Twofish>(key),
        ("sm4", 16) => keyed::<sm4::Sm4>(key),
        (name, length) => panic!("{name} with a key of {length} bytes"),
    }
}

fn digest(hash: &str, parts: &[&[u8]]) -> Vec<u8> {
    fn of<H: Digest>(parts: &[&[u8]]) -> Vec<u8> {
        let mut hash = H::new();
        parts.iter().for_each(|part| hash.update(part));
        hash.finalize().to_vec()
    }
    match hash {
        "md5" => of::<md5::Md5>(parts),
        "sha1" => of::<sha1::Sha1>(parts),
        "sha224" => of::<sha2::Sha224>(parts),
        "sha256" => of::<sha2::Sha256>(parts),
        "sha384" => of::<sha2::Sha384>(parts),
        "sha512" => of::<sha2::Sha512>(parts),
        "ripemd160" => of::<ripemd::Ripemd160>(parts),
        "sm3" => of::<sm3::Sm3>(parts),
        _ => panic!("no hash {hash}"),
    }
}

fn pbkdf2(hash: &str, password: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
    match hash {
        "md5" => pbkdf2::pbkdf2_hmac::<md5::Md5>(password, salt, iterations, out),
        "sha1" => pbkdf2::pbkdf2_hmac::<sha1::Sha1>(password, salt, iterations, out),
        "sha224" => pbkdf2::pbkdf2_hmac::<sha2::Sha224>(password, salt, iterations, out),
        "sha256" => pbkdf2::pbkdf2_hmac::<sha2::Sha256>(password, salt, iterations, out),
        "sha384" => pbkdf2::pbkdf2_hmac::<sha2::Sha384>(password, salt, iterations, out),
        "sha512" => pbkdf2::pbkdf2_hmac::<sha2::Sha512>(password, salt, iterations, out),
        "ripemd160" => pbkdf2::pbkdf2_hmac::<ripemd::Ripemd160>(password, salt, iterations, out),
        "sm3" => pbkdf2::pbkdf2_hmac::<sm3::Sm3>(password, salt, iterations, out),
        _ => panic!("no hash {hash}"),
    }
}

fn xor(block: &mut [u8], with: &[u8]) {
    block.iter_mut().zip(with).for_each(|(byte, with)| *byte ^= with);
}

/// Encrypts from sector 0 on.
fn encrypt(spec: &Spec, key: &[u8], data: &mut [u8]) {
    let (chaining, iv) = spec.mode.split_once('-').unwrap();
    let halves = if chaining == "xts" { key.split_at(key.len() / 2) } else { (key, key) };
    let main = block_cipher(spec.cipher, halves.0);
    let tweak = block_cipher(spec.cipher, halves.1);
    let essiv =
        iv.strip_prefix("essiv:").map(|hash| block_cipher(spec.cipher, &digest(hash, &[key])));
    let length = if spec.cipher == "cast5" { 8 } else { 16 };
    for (number, sector) in (0u64..).zip(data.chunks_mut(512)) {
        let mut iv = [0; 16];
        iv[..8].copy_from_slice(&number.to_le_bytes());
        if let Some(essiv) = &essiv {
            essiv(&mut iv[..length]);
        }
        if chaining == "xts" {
            tweak(&mut iv);
        }
        for block in sector.chunks_exact_mut(length) {
            match chaining {
                "ecb" => main(block),
                "cbc" => {
                    xor(block, &iv);
                    main(block);
                    iv[..length].copy_from_slice(block);
                }
                "ctr" => {
                    let mut stream = iv;
                    main(&mut stream[..length]);
                    xor(block, &stream);
                    let counter = u128::from_be_bytes(iv) >> (128 - 8 * length);
                    let next = (counter + 1) << (128 - 8 * length);
                    iv = next.to_be_bytes();
                }
                "xts" => {
                    xor(block, &iv);
                    main(block);
                    xor(block, &iv);
                    let value = u128::from_le_bytes(iv);
                    iv = ((value << 1) ^ ((value >> 127) * 0x87)).to_le_bytes();
                }
                _ => panic!("no mode {chaining}"),
            }
        }
    }
}

/// The key in stripes (`AFsplit` of the LUKS specification).
fn split(hash: &str, key: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut stripes = vec![0; key.len() * STRIPES];
    rng.fill(&mut stripes);
    let mut folded = vec![0; key.len()];
    let (random, last) = stripes.split_at_mut(key.len() * (STRIPES - 1));
    for stripe in random.chunks(key.len()) {
        xor(&mut folded, stripe);
        let width = digest(hash, &[]).len();
        for (number, block) in (0u32..).zip(folded.chunks_mut(width)) {
            let diffused = digest(hash, &[&number.to_be_bytes(), block]);
            let length = block.len();
            block.copy_from_slice(&diffused[..length]);
        }
    }
    last.copy_from_slice(&folded);
    xor(last, key);
    stripes
}

/// Sectors of one slot's key material, and between the starts of two.
fn slot_sectors(key_bytes: usize) -> usize {
    (key_bytes * STRIPES).div_ceil(4096) * 8
}

/// A header with its key material, which these passphrases open: each in its own slot.
pub(crate) fn header(spec: &Spec, passphrases: &[(usize, &[u8])], seed: u64) -> Vec<u8> {
    let sectors = slot_sectors(spec.key_bytes);
    let payload = 8 + 8 * sectors;
    let mut bytes = vec![0; payload * 512];
    let mut rng = Rng::new(seed);
    let (mut key, mut salt) = (vec![0; spec.key_bytes], [0; 32]);
    rng.fill(&mut key);
    rng.fill(&mut salt);
    let mut check = [0; 20];
    pbkdf2(spec.hash, &key, &salt, 3, &mut check);
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    let number = |value: usize| u32::try_from(value).unwrap().to_be_bytes();
    put(0, b"LUKS\xba\xbe\0\x01");
    put(8, spec.cipher.as_bytes());
    put(40, spec.mode.as_bytes());
    put(72, spec.hash.as_bytes());
    put(104, &number(payload));
    put(108, &number(spec.key_bytes));
    put(112, &check);
    put(132, &salt);
    put(164, &number(3));
    put(168, b"00000000-0000-0000-0000-000000000000");
    for slot in 0..8 {
        let (at, sector) = (208 + slot * 48, 8 + slot * sectors);
        put(at, &number(0xdead));
        put(at + 40, &number(sector));
        put(at + 44, &number(STRIPES));
        let Some((_, passphrase)) = passphrases.iter().find(|(wanted, _)| *wanted == slot) else {
            continue;
        };
        put(at, &number(0x00ac_71f3));
        put(at + 4, &number(2));
        put(at + 8, &salt);
        let mut slot_key = vec![0; spec.key_bytes];
        pbkdf2(spec.hash, passphrase, &salt, 2, &mut slot_key);
        let mut material = split(spec.hash, &key, &mut rng);
        encrypt(spec, &slot_key, &mut material);
        put(sector * 512, &material);
    }
    bytes
}

/// Makes a plain qcow2 image one under LUKS: what its clusters hold is ciphertext from now
/// on, which decrypts to something. A header of before is replaced where it is.
///
/// # Errors
/// The image can't be patched.
pub(crate) fn put_luks(path: &Path, header: &[u8]) -> Outcome {
    let image = Patch::open(path)?;
    let extensions = image.extensions()?;
    if let Some((_, at, _)) = extensions.iter().find(|extension| extension.0 == CRYPTO_HEADER) {
        image.put_u64(at + 8, header.len() as u64)?;
        return image.put(image.u64(*at)?, header);
    }
    let offset = image.length()?.next_multiple_of(image.cluster()?);
    image.put(offset, header)?;
    image.set_length((offset + header.len() as u64).next_multiple_of(image.cluster()?))?;
    // In the place of the feature names, which nobody needs; small clusters have none.
    let names = extensions.iter().find(|extension| extension.0 == FEATURE_NAMES);
    let ends = extensions.iter().map(|(_, at, length)| at + u64::from(*length).next_multiple_of(8));
    let at = match names {
        Some(&(_, at, length)) => {
            image.put_u32(at + 16, 0x696d_6764)?;
            image.put_u32(at + 20, length - 24)?;
            at - 8
        }
        None if image.u64(BACKING_OFFSET)? != 0 => return Err("the name is in the way".into()),
        None => match ends.max() {
            Some(end) => end,
            None => image.u32(HEADER_LENGTH)?.into(),
        },
    };
    image.put_u32(at, CRYPTO_HEADER)?;
    image.put_u32(at + 4, 16)?;
    image.put_u64(at + 8, offset)?;
    image.put_u64(at + 16, header.len() as u64)?;
    image.put_u32(CRYPT_METHOD, 2)
}

/// Makes a plain qcow2 or qcow image one of legacy AES.
///
/// # Errors
/// The image can't be patched.
pub(crate) fn put_aes(path: &Path) -> Outcome {
    let image = Patch::open(path)?;
    let at = if image.u32(VERSION)? == 1 { 36 } else { CRYPT_METHOD };
    image.put_u32(at, 1)
}
