"""Other people's training frameworks, each in the module of its name; needs that framework."""
