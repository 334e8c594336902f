"""The paper, reproduced: its figures and tables of any model in one folder, compared with the published figures."""
