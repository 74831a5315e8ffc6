"""From trees to files and to other libraries, and back; and the command line."""

from converters import checkpoint as checkpoint
