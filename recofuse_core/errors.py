"""Everything the library raises on purpose.

CoreError
├── ShapeError        a tensor does not have the shape, range or dtype that the call asks for
├── CheckpointError   a weights file is missing, truncated, of another format, or does not fit the network
├── ConfigError       a configuration is inconsistent or names something unknown
├── DeviceError       a device is not there, or cannot run this build of torch
├── DatasetError      a folder of pairs is incomplete or unreadable
└── NumericsError     a computation left the finite numbers
"""


class CoreError(Exception):
    """Base of every error that recofuse_core raises on purpose."""


class ShapeError(CoreError):
    """A tensor does not have the shape, range or dtype that the call asks for."""


class CheckpointError(CoreError):
    """A weights file is missing, truncated, of another format, or does not fit the network."""


class ConfigError(CoreError):
    """A configuration is inconsistent or names something unknown."""


class DeviceError(CoreError):
    """A device is not there, or cannot run this build of torch."""


class DatasetError(CoreError):
    """A folder of image pairs is incomplete or unreadable."""


class NumericsError(CoreError):
    """A computation left the finite numbers."""
