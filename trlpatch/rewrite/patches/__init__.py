"""The patches, one file each. docs/writing-a-patch.md tells how to add one."""
