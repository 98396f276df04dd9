#!/bin/sh
# dracut: says once more what is missing, above the prompt of its shell.

/sbin/imgdm-initrd why
