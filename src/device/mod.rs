//! The seam to the machine.
pub mod fiemap {
    /// x
    #[derive(Debug)]
    pub struct Fiemap;
    impl crate::source::UnwrittenProbe for Fiemap {
        fn unwritten(
            &self,
            _: &std::fs::File,
            _: crate::units::HostOffset,
            _: crate::units::HostOffset,
        ) -> std::io::Result<Vec<(crate::units::HostOffset, crate::units::HostOffset)>> {
            Ok(vec![])
        }
        fn nobody_writes(&self, _: &std::fs::File) -> bool {
            false
        }
    }
}
pub mod name {
    /// x
    pub struct DmName(String);
    impl DmName {
        pub fn new(s: &str) -> crate::Result<Self> {
            Ok(Self(s.into()))
        }
        pub fn from_image(p: &std::path::Path, _: Option<&str>) -> crate::Result<Self> {
            Ok(Self(p.to_string_lossy().into()))
        }
        pub fn as_str(&self) -> &str {
            &self.0
        }
    }
}
