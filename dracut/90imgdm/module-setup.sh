#!/bin/bash
# dracut's module: puts into the initrd what imgdm needs there.
# Goes with its neighbours to /usr/lib/dracut/modules.d/90imgdm.

# Where imgdm-initrd is, that initramfs-tools' hook has in common with this.
imgdm_lib() {
    local dir
    for dir in /usr/lib/imgdm /usr/local/lib/imgdm; do
        # shellcheck disable=SC2154  # dracut's
        [[ -x $dracutsysrootdir$dir/imgdm-initrd ]] && echo "$dir" && return
    done
    return 1
}

check() {
    require_binaries imgdm blkid || return 1
    imgdm_lib >/dev/null || return 1
    return 0
}

depends() {
    echo dm rootfs-block
}

installkernel() {
    # The machine that makes the initrd need not have any of them in use now.
    hostonly='' instmods loop dm_zero dm_snapshot dm_bufio dm_crypt \
        aes cbc xts ecb hmac sha1 sha256 sha512 essiv
    hostonly='' instmods ext4 xfs btrfs f2fs vfat nls_cp437 nls_iso8859_1 nls_ascii nls_utf8 \
        exfat ntfs3 isofs squashfs erofs
}

# shellcheck disable=SC2154  # moddir and initdir are dracut's
install() {
    local lib
    lib=$(imgdm_lib)
    inst_multiple imgdm blkid cat ln mkdir mount readlink
    # To ask for a passphrase where systemd is not there to do it.
    inst_multiple -o stty
    inst_script "$lib/imgdm-initrd" /sbin/imgdm-initrd
    inst_rules 59-imgdm.rules "$moddir/60-imgdm-dracut.rules"
    inst_hook cmdline 30 "$moddir/imgdm-cmdline.sh"
    inst_hook emergency 80 "$moddir/imgdm-emergency.sh"
    if [[ -e $dracutsysrootdir/etc/imgdmtab ]]; then
        mkdir -p "$initdir/etc/imgdm"
        "$lib/imgdm-initrd-list" >"$initdir/etc/imgdm/initrd"
    fi
    # What images may name.
    [[ ! -e $dracutsysrootdir/etc/imgdm.conf ]] || inst_simple /etc/imgdm.conf
    dracut_need_initqueue
}
