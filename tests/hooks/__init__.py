"""Hooks against the real packages of their frameworks: `make hooks`, which installs them.

Apart from the other tests, which need none of them.
"""
