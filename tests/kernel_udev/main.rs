//! imgdm beside udev and systemd, on a real kernel with device-mapper, as root: run by
//! `tests/kernel_udev/run`, which boots a guest for each group.
//!
//! The names of modules say where their tests belong: `udev_*` where udev runs with
//! imgdm's rule, `systemd_*` where systemd booted the guest as well, `norule_*` where
//! udev runs without the rule. `boot_*` come first where systemd booted the guest, with what
//! it has attached, and `shutdown` last of all.

// Helpers that fail are tests that fail.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[macro_use]
#[path = "../kernel/guest.rs"]
mod guest;
mod boot_start;
mod boot_stop;
mod hidden;
mod norule_warning;
mod shutdown;
mod systemd_hidden;
mod systemd_mount;
mod systemd_units;
mod udev_dead;
mod udev_detach;
mod udev_filter;
mod udev_hidden;
mod udev_kill;
mod udev_links;
mod udev_lvm;
mod udev_masked;
mod udev_mount;
mod udev_partitions;
mod world;
