//! After boot_start: the units are stopped, so that the other tests begin with nothing.

use crate::guest::*;
use crate::world::settle;

#[test]
fn everything_goes_when_its_units_stop() {
    assert_eq!(std::env::var("IMGDM_GUEST").as_deref(), Ok("systemd"));
    sh("systemctl stop 'srv-whole.mount' 'srv-part*.mount' 'imgdm-tab@*.service'");
    settle();
    assert_nothing_left();
    let failed = tool("systemctl", ["list-units", "--failed", "--plain", "--no-legend"]);
    let failed: Vec<_> = failed.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(failed, ["imgdm-tab@gone.service", "imgdm-tab@needed.service"]);
    // Which is how they were after the boot.
    tool("systemctl", ["reset-failed"]);
}
