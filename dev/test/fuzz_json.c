// JSON from anyone: never a crash, and what is accepted is accepted again as written out
#include "llmc/json.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Error err;
    cJSON* root = json_parse((const char*)data, size, &err);
    if (!root) return 0;
    const cJSON* item = json_get(root, "key");
    int64_t value;
    if (json_whole(item, &value)) require((double)value == item->valuedouble, "a whole number is exact");
    char* text = cJSON_PrintUnformatted(root);
    cJSON* again = json_parse(text, strlen(text), &err);
    require(again && cJSON_Compare(root, again, true), "JSON survives being written and read");
    cJSON_Delete(again);
    cJSON_Delete(root);
    free(text);
    return 0;
}
