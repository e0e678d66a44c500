"""The options of the active `PatchFastRL` call, under the names that the hooks use."""

from trlpatch.options import activate as set_options
from trlpatch.options import active as options

__all__ = ["options", "set_options"]
