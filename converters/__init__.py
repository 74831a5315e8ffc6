"""Conversion between trees and files or other libraries, and the command line."""

from converters import checkpoint as checkpoint
