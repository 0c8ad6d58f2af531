"""Plug-ins, one file each; a new one is registered in `advalign.objectives`."""
