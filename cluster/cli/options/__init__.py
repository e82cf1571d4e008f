"""Every option of every command, once: the parser, --help, the defaults, the configuration and docs/options.md come from here."""
