//! A walk of a qcow2 or qcow file by itself: plain reads of its bytes, by the specification.
//! What `imgdm check -M` says is compared with it.

use serde_json::{Value, json};

use crate::common::patch::OFFSET_MASK;
use crate::common::process::Outcome;

const COPIED_OR_COMPRESSED: [u64; 2] = [1 << 63, 1 << 62];

/// What a byte of the file is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    Free,
    Data,
    Metadata,
}

/// A file, and what the walk found in it.
pub(crate) struct Viscera {
    bytes: Vec<u8>,
    cluster: usize,
    used: Vec<Use>,
    /// The proposal's keys, and the refcount blocks.
    pub(crate) expected: Value,
    pub(crate) data_references: u64,
    pub(crate) streams: u64,
    pub(crate) in_data_file: u64,
    walked: std::collections::BTreeSet<u64>,
}

fn at(bytes: &[u8], offset: u64, length: usize) -> &[u8] {
    let start = usize::try_from(offset).unwrap();
    &bytes[start..start + length]
}

fn be64(bytes: &[u8], offset: u64) -> u64 {
    u64::from_be_bytes(at(bytes, offset, 8).try_into().unwrap())
}

fn be32(bytes: &[u8], offset: u64) -> u64 {
    u32::from_be_bytes(at(bytes, offset, 4).try_into().unwrap()).into()
}

fn be16(bytes: &[u8], offset: u64) -> u64 {
    u16::from_be_bytes(at(bytes, offset, 2).try_into().unwrap()).into()
}

fn place(offset: u64, size: u64) -> Value {
    json!({"offset": offset, "size": size})
}

fn text(bytes: &[u8], offset: u64, length: u64) -> String {
    let bytes = at(bytes, offset, usize::try_from(length).unwrap());
    String::from_utf8(bytes.to_vec()).unwrap()
}

impl Viscera {
    /// Walks a whole, healthy file.
    pub(crate) fn of(bytes: Vec<u8>) -> Self {
        let is_qcow2 = be32(&bytes, 4) >= 2;
        let cluster = if is_qcow2 { 1 << be32(&bytes, 20) } else { 1 << bytes[32] };
        let mut walk = Self {
            used: vec![Use::Free; bytes.len()],
            bytes,
            cluster,
            expected: Value::Null,
            data_references: 0,
            streams: 0,
            in_data_file: 0,
            walked: std::collections::BTreeSet::new(),
        };
        walk.expected = if is_qcow2 { walk.qcow2() } else { walk.qcow() };
        walk
    }

    fn u64(&self, offset: u64) -> u64 {
        be64(&self.bytes, offset)
    }

    fn u32(&self, offset: u64) -> u64 {
        be32(&self.bytes, offset)
    }

    fn cluster(&self) -> u64 {
        self.cluster as u64
    }

    fn mark(&mut self, offset: u64, length: u64, used: Use) -> Value {
        let end = (offset + length).min(self.bytes.len() as u64);
        for at in offset..end {
            self.used[usize::try_from(at).unwrap()] = used;
        }
        place(offset, length)
    }

    fn qcow2(&mut self) -> Value {
        let version = self.u32(4);
        let header_length = if version == 2 { 72 } else { self.u32(100) };
        let incompatible = if version == 2 { 0 } else { self.u64(72) };
        let autoclear = if version == 2 { 0 } else { self.u64(88) };
        self.mark(0, header_length, Use::Metadata);
        let mut viscera = json!({
            "qcow2-header": {"location": place(0, self.cluster()), "version": version},
        });
        let (mut extension, mut bitmaps) = (header_length, None);
        loop {
            let (kind, length) = (self.u32(extension), self.u32(extension + 4));
            self.mark(extension, (8 + length).next_multiple_of(8), Use::Metadata);
            match kind {
                0 => break,
                0x2385_2875 => bitmaps = Some(extension + 8),
                0x0537_be77 => {
                    let (offset, length) = (self.u64(extension + 8), self.u64(extension + 16));
                    self.mark(offset, length, Use::Metadata);
                }
                _ => {}
            }
            extension += (8 + length).next_multiple_of(8);
        }
        if self.u64(8) != 0 {
            self.mark(self.u64(8), self.u32(16), Use::Metadata);
        }
        let table = (self.u64(48), self.u32(56) * self.cluster());
        let location = self.mark(table.0, table.1, Use::Metadata);
        viscera["refcount-table"] = json!({ "location": location });
        let blocks: Vec<u64> = (0..table.1 / 8).map(|i| self.u64(table.0 + i * 8)).collect();
        let cluster = self.cluster();
        let blocks = blocks.into_iter().filter(|&block| block != 0);
        viscera["refcount-blocks"] =
            blocks.map(|block| self.mark(block, cluster, Use::Metadata)).collect();
        let active = (self.u64(40), self.u32(36));
        viscera["active-l1"] = self.l1("L1 active table", active, incompatible);
        if self.u32(60) > 0 {
            viscera["snapshot-table"] = self.snapshots(incompatible);
        }
        if let Some(bitmaps) = bitmaps.filter(|_| autoclear & 1 != 0) {
            viscera["bitmaps"] = self.bitmaps(bitmaps);
        }
        viscera
    }

    fn snapshots(&mut self, incompatible: u64) -> Value {
        let start = self.u64(64);
        let mut entry = start;
        let mut list = Vec::new();
        let mut end = start;
        for _ in 0..self.u32(60) {
            let [id, name] = [12, 14].map(|field| be16(&self.bytes, entry + field));
            let extra = self.u32(entry + 36);
            let name_at = entry + 40 + extra + id;
            let title = text(&self.bytes, name_at, name);
            let table = (self.u64(entry), self.u32(entry + 8));
            list.push(self.l1(&title, table, incompatible));
            end = name_at + name;
            entry = end.next_multiple_of(8);
        }
        let location = self.mark(start, end - start, Use::Metadata);
        json!({"location": location, "l1-list": list})
    }

    fn bitmaps(&mut self, extension: u64) -> Value {
        let (length, start) = (self.u64(extension + 8), self.u64(extension + 16));
        let location = self.mark(start, length, Use::Metadata);
        let mut entries = Vec::new();
        let mut entry = start;
        while entry < start + length {
            let (table, count) = (self.u64(entry), self.u32(entry + 8));
            let (name, extra) = (be16(&self.bytes, entry + 18), self.u32(entry + 20));
            let cluster = self.cluster();
            let mut list = Vec::new();
            for index in 0..count {
                list.push(match self.u64(table + index * 8) {
                    0 => json!({"type": "all-zeros"}),
                    1 => json!({"type": "all-ones"}),
                    offset => {
                        let cluster = self.mark(offset, cluster, Use::Metadata);
                        json!({"type": "serialized", "cluster": cluster})
                    }
                });
            }
            let location = self.mark(table, count * 8, Use::Metadata);
            entries.push(json!({
                "bitmap-name": text(&self.bytes, entry + 24 + extra, name),
                "bitmap-table": {"location": location, "table-entries": list},
            }));
            entry += (24 + extra + name).next_multiple_of(8);
        }
        json!({
            "nb-bitmaps": entries.len(),
            "bitmap-dir": {"location": location, "dir-entries": entries},
        })
    }

    fn l1(&mut self, name: &str, (start, count): (u64, u64), incompatible: u64) -> Value {
        let mut list = Vec::new();
        for index in 0..count {
            let table = self.u64(start + index * 8) & OFFSET_MASK;
            if table != 0 {
                let cluster = self.cluster();
                list.push(self.mark(table, cluster, Use::Metadata));
                if self.walked.insert(table) {
                    self.l2(table, incompatible);
                }
            }
        }
        let location = self.mark(start, count * 8, Use::Metadata);
        json!({"name": name, "location": location, "l2-list": list})
    }

    fn l2(&mut self, table: u64, incompatible: u64) {
        let extended = incompatible & 16 != 0;
        let stride = if extended { 16 } else { 8 };
        let cluster_bits = self.cluster.ilog2();
        for index in 0..self.cluster() / stride {
            let entry = self.u64(table + index * stride);
            if entry & COPIED_OR_COMPRESSED[1] != 0 {
                let shift = 62 - (cluster_bits - 8);
                let offset = entry & ((1 << shift) - 1);
                let sectors = (entry >> shift & ((1 << (cluster_bits - 8)) - 1)) + 1;
                self.mark(offset, sectors * 512 - offset % 512, Use::Data);
                self.streams += 1;
                continue;
            }
            let offset = entry & OFFSET_MASK;
            if incompatible & 4 != 0 {
                self.in_data_file += u64::from(offset != 0 || entry & COPIED_OR_COMPRESSED[0] != 0);
            } else if offset != 0 {
                let cluster = self.cluster();
                self.mark(offset, cluster, Use::Data);
                self.data_references += 1;
            }
        }
    }

    fn qcow(&mut self) -> Value {
        self.mark(0, 48, Use::Metadata);
        if self.u64(8) != 0 {
            self.mark(self.u64(8), self.u32(16), Use::Metadata);
        }
        let (cluster_bits, l2_bits) = (u64::from(self.bytes[32]), u64::from(self.bytes[33]));
        let start = self.u64(40);
        let count = self.u64(24).div_ceil(1 << (cluster_bits + l2_bits));
        let mut list = Vec::new();
        for index in 0..count {
            let table = self.u64(start + index * 8);
            if table == 0 {
                continue;
            }
            list.push(self.mark(table, 8 << l2_bits, Use::Metadata));
            for index in 0..1 << l2_bits {
                let entry = self.u64(table + index * 8);
                if entry & COPIED_OR_COMPRESSED[0] != 0 {
                    let shift = 63 - cluster_bits;
                    let length = entry >> shift & ((1 << cluster_bits) - 1);
                    self.mark(entry & ((1 << shift) - 1), length, Use::Data);
                    self.streams += 1;
                } else if entry != 0 {
                    let cluster = self.cluster();
                    self.mark(entry, cluster, Use::Data);
                    self.data_references += 1;
                }
            }
        }
        let location = self.mark(start, count * 8, Use::Metadata);
        json!({
            "qcow-header": {"location": place(0, 48), "version": 1},
            "active-l1": {"name": "L1 active table", "location": location, "l2-list": list},
        })
    }

    fn refcount(&self, cluster: u64) -> u64 {
        let order = if self.u32(4) == 2 { 4 } else { self.u32(96) };
        let entries = (self.cluster() * 8) >> order;
        let (table, index) = (self.u64(48), cluster / entries);
        if index >= self.u32(56) * self.cluster() / 8 {
            return 0;
        }
        let block = self.u64(table + index * 8);
        if block == 0 {
            return 0;
        }
        let (bit, bits) = ((cluster % entries) << order, 1 << order);
        if bits < 8 {
            let byte = at(&self.bytes, block + bit / 8, 1)[0];
            return u64::from(byte >> (bit % 8)) & ((1 << bits) - 1);
        }
        let bytes = at(&self.bytes, block + bit / 8, bits / 8);
        bytes.iter().fold(0, |count, &byte| count << 8 | u64::from(byte))
    }

    /// Checks what `viscera` says against this walk, to the byte.
    ///
    /// # Errors
    /// Something differs.
    pub(crate) fn compare(&self, viscera: &Value) -> Outcome {
        for (key, expected) in self.expected.as_object().unwrap() {
            if viscera[key] != *expected {
                return Err(format!("{key} is {:#}, should be {expected:#}", viscera[key]));
            }
        }
        for key in ["snapshot-table", "bitmaps"] {
            if viscera.get(key).is_some() != self.expected.get(key).is_some() {
                return Err(format!("{key} should be there or not: {viscera:#}"));
            }
        }
        let data = &viscera["data-clusters"];
        let counts = ["count", "compressed-streams", "in-data-file"].map(|key| data[key].as_u64());
        if counts != [self.data_references, self.streams, self.in_data_file].map(Some) {
            return Err(format!("counts differ: {counts:?}"));
        }
        if viscera["problems"] != json!([]) || viscera.get("not-examined").is_some() {
            return Err(format!("a healthy image: {:#}", viscera["problems"]));
        }
        self.compare_ranges(viscera)
    }

    fn compare_ranges(&self, viscera: &Value) -> Outcome {
        let mut said = vec![None; self.bytes.len()];
        let mut note = |(start, end): (usize, usize), used: &'static str| {
            for place in &mut said[start..end] {
                if let Some(before) = place.replace(used) {
                    return Err(format!("{start:#x}..{end:#x} is {used} and {before}"));
                }
            }
            Ok(())
        };
        for range in ranges(&viscera["data-clusters"]["ranges"]) {
            note(range, "data")?;
        }
        for used in UNCLAIMED {
            let list = viscera[used].as_array().unwrap();
            for (range, item) in ranges(&viscera[used]).into_iter().zip(list) {
                note(range, used)?;
                let first = self.bytes[range.0..range.1].iter().position(|&byte| byte != 0);
                let first = first.map(|first| (range.0 + first) as u64);
                let found = (item["all-zeros"].as_bool(), item["first-non-zero"].as_u64());
                if found != (Some(first.is_none()), first) {
                    return Err(format!("{item} has its first byte unlike 0 at {first:?}"));
                }
            }
        }
        let has_refcounts = self.expected.get("refcount-table").is_some();
        for (start, cluster) in self.used.chunks(self.cluster).enumerate() {
            let is_free = cluster.iter().all(|&used| used == Use::Free);
            let free = match has_refcounts.then(|| self.refcount(start as u64)) {
                _ if !is_free => "slack",
                Some(0) => "unused",
                _ => "unreferenced",
            };
            for (index, &used) in cluster.iter().enumerate() {
                let expected = match used {
                    Use::Data => Some("data"),
                    Use::Metadata => None,
                    Use::Free => Some(free),
                };
                let place = start * self.cluster + index;
                if said[place] != expected {
                    let said = said[place];
                    return Err(format!("byte {place:#x} is {expected:?}, imgdm says {said:?}"));
                }
            }
        }
        Ok(())
    }

    /// Clusters that nothing refers to and that have a refcount.
    pub(crate) fn leaked_clusters(&self) -> u64 {
        let free = |cluster: &[Use]| cluster.iter().all(|&used| used == Use::Free);
        let chunks = self.used.chunks(self.cluster).zip(0..);
        chunks.filter(|(cluster, index)| free(cluster) && self.refcount(*index) > 0).count() as u64
    }
}

pub(crate) const UNCLAIMED: [&str; 3] = ["slack", "unused", "unreferenced"];

fn ranges(list: &Value) -> Vec<(usize, usize)> {
    let number = |item: &Value, key| usize::try_from(item[key].as_u64().unwrap()).unwrap();
    let list = list.as_array().unwrap().iter();
    list.map(|item| (number(item, "offset"), number(item, "offset") + number(item, "size")))
        .collect()
}

/// All locations of metadata in `viscera`, whatever the shape.
fn locations(value: &Value, found: &mut Vec<(u64, u64)>) {
    match value {
        Value::Object(fields) => {
            let number = |key| fields.get(key).and_then(Value::as_u64);
            if let (Some(offset), Some(size), None) =
                (number("offset"), number("size"), fields.get("kind"))
            {
                found.extend((size > 0).then(|| (offset, offset.saturating_add(size))));
            }
            fields.values().for_each(|value| locations(value, found));
        }
        Value::Array(list) => list.iter().for_each(|value| locations(value, found)),
        _ => {}
    }
}

/// Checks of any image, also a damaged one, that all ranges together cover the file, and that
/// what is said to be referred to by nothing lies in no piece.
///
/// # Errors
/// There is a gap, or an overlap.
pub(crate) fn covers(viscera: &Value, length: u64) -> Outcome {
    let mut metadata = Vec::new();
    let mut header = Vec::new();
    for (key, value) in viscera.as_object().unwrap() {
        match key.as_str() {
            "data-clusters" | "slack" | "unused" | "unreferenced" | "not-examined" => {}
            // The proposal gives the header a whole cluster, whatever is in it.
            "qcow2-header" => locations(value, &mut header),
            _ => locations(value, &mut metadata),
        }
    }
    let mut exclusive = Vec::new();
    for key in ["slack", "unused", "unreferenced", "not-examined"] {
        locations(viscera.get(key).unwrap_or(&Value::Null), &mut exclusive);
    }
    let unclaimed = exclusive.len();
    locations(&viscera["data-clusters"]["ranges"], &mut exclusive);
    let mut sorted = exclusive.clone();
    sorted.sort_unstable();
    if let Some(pair) = sorted.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        return Err(format!("ranges overlap: {pair:x?}"));
    }
    metadata.sort_unstable();
    for &(start, end) in &exclusive[..unclaimed] {
        let meets = |&&(from, to): &&(u64, u64)| from < end && start < to;
        if let Some(piece) = metadata.iter().find(meets) {
            return Err(format!("nothing refers to {start:x}..{end:x}, but {piece:x?}"));
        }
    }
    let mut all = [sorted, metadata, header].concat();
    all.sort_unstable();
    let mut at = 0;
    for (start, end) in all {
        if start > at && at < length {
            return Err(format!("nothing is said of {at:#x}..{start:#x}"));
        }
        at = at.max(end);
    }
    if at < length { Err(format!("nothing is said of {at:#x}..{length:#x}")) } else { Ok(()) }
}
