"""Puts patched text in the place of TRL's: cache, import hook, in-place patching, report. Imports no TRL itself."""
