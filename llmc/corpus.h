/*
The project's own sources, embedded in the program: what it learns when it is given no data. The Makefile lists the files and
joins them into two texts, one to train on and one of held-out files to validate with. In both, files are separated by one
byte 28, ASCII's file separator, which no source holds.
*/
#pragma once

#include <stddef.h>

#ifdef __APPLE__
#define EMBED_SECTION ".section __TEXT,__const\n"
#define EMBED_NAME(name) "_" #name
#else
#define EMBED_SECTION ".section .rodata\n"
#define EMBED_NAME(name) #name
#endif

// char name[], the bytes of the file at path, and char name_end[], where they end
#define EMBED(name, path)                                                                                              \
    __asm__(EMBED_SECTION ".globl " EMBED_NAME(name) "\n" EMBED_NAME(name) ":\n.incbin \"" path "\"\n"                  \
            ".globl " EMBED_NAME(name##_end) "\n" EMBED_NAME(name##_end) ":\n.byte 0\n.text\n");                       \
    extern const char name[], name##_end[]

enum { FILE_SEPARATOR = 28 };
