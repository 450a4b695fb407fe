"""EasyR1 as an engine: its own files, its own command, its own environment."""

VERSION = "0.3.3.dev0"
COMMIT = "b44b311b669bf1fd1aa2fc36f2251482ba33cb16"
