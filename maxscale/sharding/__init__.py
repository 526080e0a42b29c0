"""Logical axes onto a multi-slice device mesh."""
