use super::*;

fn passphrase(text: &str) -> Passphrase {
    Passphrase::new(Zeroizing::new(text.as_bytes().to_vec()))
}

#[test]
fn a_legacy_key_is_cut_or_padded_to_16_bytes() {
    let source = Source::from_bytes("x", Vec::new());
    let key = |text| CryptHeader::Aes.unlock(&source, &passphrase(text)).unwrap();
    assert_eq!(key("abc").bytes(), b"abc\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(key("0123456789abcdefgh").bytes(), b"0123456789abcdef");
    assert_eq!(key("ab\0cd").bytes(), b"ab\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn keys_are_not_shown() {
    assert_eq!(format!("{:?}", passphrase("secret")), "Passphrase(..)");
}
