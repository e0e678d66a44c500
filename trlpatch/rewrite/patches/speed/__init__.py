"""Speed patches: each leaves out work whose result is known, and applies only where an option asks for it.

Without the option they are no part of a plan: patched text, reports and goldens are the same as without them.
"""
