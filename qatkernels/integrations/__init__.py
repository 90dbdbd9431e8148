"""Integrations with other training frameworks. Each is in a module named like its framework, and needs it."""
