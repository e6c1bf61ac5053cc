"""Why a rig is not read, found or applied.

RigError
├── BadRigError         a rig, or its file, that is damaged, impossible, or not for these pictures
├── UnsureError         a calibration that found something, and would not swear to it
└── NothingFoundError   a calibration that found nothing: no structure, no target
"""


class RigError(Exception):
    """Base of what recofuse_rigs raises on purpose. The message says what is wrong and what is accepted."""


class BadRigError(RigError):
    """A rig, or its file, that is damaged, impossible, or not for these pictures."""


class UnsureError(RigError):
    """A calibration that found something, and would not swear to it."""


class NothingFoundError(RigError):
    """A calibration that found nothing to go by."""
