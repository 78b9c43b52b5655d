"""Acts: the scheduler process. Importing its modules imports torch and SGLang."""
