//! Reading imgdmtab, for the commands that go by it.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use imgdm::device::name::DmName;
use imgdm::imgdmtab::{MAX_LEN, Tab, TabError, TabErrorKind};
use imgdm::{Error, Result};

/// The table at a path, its names looked at too.
pub(crate) fn read(path: &Path) -> Result<Tab> {
    let mut text = Vec::new();
    // One byte more than is parsed, so that what is too long is seen to be.
    File::open(path)
        .and_then(|file| file.take(MAX_LEN + 1).read_to_end(&mut text))
        .map_err(|error| Error::io("cannot read the table of images", error).at_path(path))?;
    let mut tab = Tab::parse(&text);
    let Tab { entries, errors } = &mut tab;
    entries.retain(|entry| match DmName::new(&entry.name) {
        Ok(_) => true,
        Err(error) => {
            let kind = TabErrorKind::Name(error.kind().to_string());
            // What is no name can't be waited for either.
            errors.push(TabError { line: entry.line, name: None, kind });
            false
        }
    });
    for error in errors.iter_mut() {
        error.name = error.name.take().filter(|name| DmName::new(name).is_ok());
    }
    errors.sort_by_key(|error| error.line);
    Ok(tab)
}
