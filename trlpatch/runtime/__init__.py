"""Patching at run time: cache, import hook, in-place module swap, session, report. Imports no TRL itself."""
