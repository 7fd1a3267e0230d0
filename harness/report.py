"""stub"""


def write_page(folders, path):
    pass
