"""Student, teacher, and the two as one."""
