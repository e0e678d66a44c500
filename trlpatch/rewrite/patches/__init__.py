"""Patch modules, one file each, found by `trlpatch.rewrite.registry`. docs/writing-a-patch.md tells how to add one."""
