"""attach(): an optimizer's step contains the penalty, once, through .grad or beside it."""

from .attachment import Attachment, attach, attachments_of, resume, sgd_groups
from .once import in_steps_of, mark_accumulated, mark_backward
from .optimizers import unwrapped

__all__ = [
    "Attachment",
    "attach",
    "attachments_of",
    "in_steps_of",
    "mark_accumulated",
    "mark_backward",
    "resume",
    "sgd_groups",
    "unwrapped",
]
