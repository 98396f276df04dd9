//! From extents to what the kernel is to load, and what stands in the way.

mod segment;

pub use segment::{
    Backing, BackingId, Bindings, MAX_SEGMENTS_PER_TABLE, PlannedTable, Segment, SegmentTarget,
    TableId, TableRole, TableSource,
};
