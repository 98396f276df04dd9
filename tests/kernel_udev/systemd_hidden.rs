//! The same with systemd, which LVM has activate its volume groups.

use crate::hidden;
use crate::world::World;

#[test]
fn volume_groups_of_a_guest_stay_inactive() {
    hidden::lvm(&World::new("systemd"));
}

#[test]
fn a_guests_btrfs_is_not_registered() {
    hidden::btrfs(&World::new("systemd"));
}

#[test]
fn the_hosts_link_by_uuid_is_not_shadowed() {
    hidden::same_uuid(&World::new("systemd"));
}
