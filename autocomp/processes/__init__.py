"""Forked children: how they are started, asked, ended, and kept quiet."""
