"""The kinds of mutation, a module per category; importing this registers all of them.

A kind is one small function: it gets a host and yields the texts that upstream might change it into. Its first line of
documentation says which change of upstream it imitates.
"""

from tests.mutation.kinds import added_scopes as added_scopes
from tests.mutation.kinds import added_spellings as added_spellings
from tests.mutation.kinds import build as build
from tests.mutation.kinds import config as config
from tests.mutation.kinds import harmless as harmless
from tests.mutation.kinds import harmless_additions as harmless_additions
from tests.mutation.kinds import memory as memory
from tests.mutation.kinds import modules as modules
from tests.mutation.kinds import rollout as rollout
from tests.mutation.kinds import sync as sync
