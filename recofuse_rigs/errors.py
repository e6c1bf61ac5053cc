"""Why a rig is not read, found or applied.

RigError
├── BadRigError         a rig, or its file, that is damaged, impossible, or not for these pictures
├── UnsureError         a calibration that found something, and would not swear to it
├── NothingFoundError   a calibration that found nothing: no structure, no target
├── BadPairsError       a folder of pairs that is not there, has no pairs, or holds what is no picture
└── BadNetworkError     a network's file of this package that is missing, damaged, or not for this OpenCV
"""


class RigError(Exception):
    """Base of what recofuse_rigs raises on purpose. The message says what is wrong and what is accepted."""


class BadRigError(RigError):
    """A rig, or its file, that is damaged, impossible, or not for these pictures."""


class UnsureError(RigError):
    """A calibration that found something, and would not swear to it."""


class NothingFoundError(RigError):
    """A calibration that found nothing to go by."""


class BadPairsError(RigError):
    """A folder of pairs that is not there, has no pairs, or holds what is no picture."""


class BadNetworkError(RigError):
    """A network's file of this package that is missing, damaged, or not for this OpenCV."""
