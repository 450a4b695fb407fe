"""Strict configuration: YAML files and command-line overrides into typed, frozen objects."""
