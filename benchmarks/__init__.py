"""What trlpatch costs and saves, measured; docs/performance.md has the figures."""
