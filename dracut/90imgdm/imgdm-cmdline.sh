#!/bin/sh
# dracut: lets the loop that waits for devices attach images, and wait for theirs.

imgdm_devices=$(/sbin/imgdm-initrd devices)
if [ -n "$imgdm_devices" ]; then
    # Whenever udev has come to rest, as long as something is waited for.
    /sbin/initqueue --settled --unique --name imgdm /sbin/imgdm-initrd attach
    for imgdm_device in $imgdm_devices; do
        wait_for_dev "$imgdm_device"
    done
fi
# A check wants to write, and the device takes no writes: dracut would stop in a shell.
imgdm_root=$(getarg root=)
if /sbin/imgdm-initrd has "${imgdm_root#block:}"; then
    echo rd.skipfsck >/etc/cmdline.d/90imgdm.conf
fi
unset imgdm_devices imgdm_device imgdm_root
