"""`nemo distill`: nothing is registered with NeMo-Run until `commands.register_commands()` is called."""
